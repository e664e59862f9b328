"""Code that functions share: names, tables, values, results, and checks of arguments."""
