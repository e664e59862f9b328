"""What the verbs share: names, values of a table, results, and checks of arguments."""
