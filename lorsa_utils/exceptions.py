"""The one error that is meant for people; it needs neither torch nor anything else of the kit."""


class UserError(Exception):
    """Bad input or a damaged artefact. The message is one sentence that names what to do about it."""
