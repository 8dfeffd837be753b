"""The error that a person can mend."""


class UserError(Exception):
    """Something in the config, the data or the machine is wrong, and the message says what and how to mend it.

    `launch/` prints the message alone, without a traceback, and exits with code 2.
    """
