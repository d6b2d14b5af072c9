"""The errors that speak to the user."""


class UserError(ValueError):
    """What is wrong with the user's input, data or machine; the launcher prints it in one line."""
