"""The errors a user can cause and can mend."""


class UserError(Exception):
    """Bad input: the message names the key or file, the value that came and what is allowed.

    Scripts print the message alone and exit with status 2.
    """
