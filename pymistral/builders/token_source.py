"""Where the token for Hugging Face comes from."""

from __future__ import annotations

import re

from ..errors import ModelLoadError

_FORM = re.compile(r"cache|none|(env|path|literal):.+", re.DOTALL)


class TokenSource(str):
    """Where the token for Hugging Face comes from; the plain string says the same.

    ``"cache"`` is what Hugging Face's own tools use, ``"none"`` no token, and ``"env:NAME"``, ``"path:FILE"`` and ``"literal:TOKEN"`` are
    what they say. Its ``repr`` does not show a literal token.
    """

    __slots__ = ()

    def __new__(cls, source: str) -> TokenSource:
        if not isinstance(source, str) or not _FORM.fullmatch(source):
            # The value is not repeated, since it may be a secret.
            raise ModelLoadError("token_source must be 'cache', 'none', 'env:NAME', 'path:FILE' or 'literal:TOKEN'")
        return super().__new__(cls, source)

    @classmethod
    def cache_token(cls) -> TokenSource:
        """The environment's token, or the one that was logged in with."""
        return cls("cache")

    @classmethod
    def none(cls) -> TokenSource:
        """No token."""
        return cls("none")

    @classmethod
    def env_var(cls, name: str) -> TokenSource:
        """The value of an environment variable."""
        return cls(f"env:{name}")

    @classmethod
    def path(cls, file: str) -> TokenSource:
        """The contents of a file."""
        return cls(f"path:{file}")

    @classmethod
    def literal(cls, token: str) -> TokenSource:
        """The token itself."""
        return cls(f"literal:{token}")

    def __repr__(self) -> str:
        return f"TokenSource({'literal:...' if self.startswith('literal:') else str(self)!r})"
