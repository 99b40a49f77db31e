"""Settings that all servers have in common: address, key, rate, retries, and the price and budget of the texts sent to them."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from selfeval.config.fields import CountOrNone, Positive, PositiveOrNone, Section

__all__ = ["ServerConfig"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerConfig(Section):
    """Settings of a server with a protocol of OpenAI."""

    url: str = ""
    """Base URL of the server, such as `http://localhost:8000/v1`. Required."""
    model: str = ""
    """Name of the model at the server. Required."""
    key_variable: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = ""
    """Optional. Environment variable that holds the API key; its name must end in `API_KEY`. Default: no key is sent."""
    in_flight: Annotated[int, Field(ge=1, le=256, strict=True)] = 4
    """Maximum number of requests at the same time."""
    requests_per_minute: CountOrNone = None
    """Optional. Maximum number of requests per minute, retries included. Default: no limit."""
    timeout: Positive = 120.0
    """Time limit of a request in seconds."""
    retries: Annotated[int, Field(ge=0, le=20, strict=True)] = 5
    """Retries of a request after a connection error, a time-out, or status 408, 409, 429 or 500 and above."""
    price_read: PositiveOrNone = None
    """Optional. Price of a million prompt tokens, in any currency."""
    budget: PositiveOrNone = None
    """Optional. Cost of all answers in the run folder at which the run stops; needs the price. Default: no limit."""
    budget_tokens: CountOrNone = None
    """Optional. The same in tokens, read and written. Default: no limit."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if not value:
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "is not an address; write http:// or https://, a host and the path, such as http://localhost:8000/v1"
            )
        # It is recorded in run.json and shown in messages.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not contain a user, a password, a query or a fragment; put a key into key_variable")
        return value.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def _names_a_key(cls, value: str) -> str:
        # A recipe from somebody else must not send just any variable, such as the password of a data base, to its server.
        if value and not value.upper().endswith("API_KEY"):
            raise ValueError("must end in API_KEY; export the key under such a name")
        return value

    @model_validator(mode="after")
    def _keeps_the_key(self) -> ServerConfig:
        parts = urlsplit(self.url)
        if self.key_variable and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(f"the key would be sent to {self.url} without encryption; use https, or remove key_variable")
        return self
