from ._predict import predict

__all__ = ["predict"]
