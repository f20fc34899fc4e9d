"""The errors a user can cause and can mend."""


class UserError(Exception):
    """Bad input: the message names the key or file, the value that came and what is allowed.

    Scripts print the message alone and exit with status 2. Of several ranks that raise the same, the first of each machine
    prints it.
    """


class RankError(UserError):
    """One that the other ranks do not raise: printed whatever the rank."""
