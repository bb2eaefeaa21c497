"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input: the message says which file, which row or key, and what was expected.

    The command line and every stage print the message without a traceback and exit with code 2.
    """
