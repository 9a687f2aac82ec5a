"""What users are told when something cannot be."""

import pytest

from lorsa_utils.exceptions import UserError


def refused(words: str) -> pytest.RaisesExc[UserError]:
    """The block must end in a `UserError` of one sentence with such words."""
    return pytest.raises(UserError, match=words, check=is_one_sentence)


def is_one_sentence(error: UserError) -> bool:
    return str(error).endswith(".") and "\n" not in str(error)
