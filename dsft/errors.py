"""The error that the user can fix."""


class UserError(Exception):
    """Something in the config, the data or the machine is wrong, and the message says what and how to fix it.

    `launch/` prints the message alone, without a traceback, and exits with code 2.
    """
