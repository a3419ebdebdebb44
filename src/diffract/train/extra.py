"""Training needs packages that come with an extra."""

from __future__ import annotations

from importlib.util import find_spec

from diffract.errors import DiffractError

PACKAGES = ("accelerate", "tokenizers", "transformers")


def require_extra() -> None:
    """Raise unless what training needs is installed.

    Raises:
        DiffractError: It is not; the message says how to install it.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise DiffractError(f"training needs {', '.join(missing)}: pip install 'diffract-llm[train]'.")
