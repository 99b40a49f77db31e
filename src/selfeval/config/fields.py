"""Base class and annotated types of the configuration sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from selfeval.texts import visible

__all__ = [
    "Count",
    "CountOrAuto",
    "CountOrNone",
    "DeviceName",
    "FractionOrNone",
    "Nucleus",
    "Positive",
    "PositiveOrNone",
    "Section",
    "Share",
    "ShareOrNone",
    "Size",
]


def _none_word(value: Any) -> Any:
    """Parse the word `none`, because TOML has no null, and refuse 0, which a reader may take for "off"."""
    if value == "none":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        raise ValueError("must be greater than 0; none disables it")
    return value


_OPTIONAL = BeforeValidator(_none_word)


def _count_or_auto(value: Any) -> Any:
    """Refuse here what neither member of the union allows, so there is one message instead of one per member."""
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError('must be a whole number of at least 1, or "auto"')
    return value


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Nucleus = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
# Strict, because pydantic would otherwise accept true and 1.0 as integers.
Count = Annotated[int, Field(ge=1, strict=True)]
DeviceName = Annotated[str, Field(pattern=r"^(cpu|disk|cuda:\d+)$")]
Size = Annotated[ByteSize, Field(gt=0)]

PositiveOrNone = Annotated[Positive | None, _OPTIONAL]
FractionOrNone = Annotated[Annotated[float, Field(gt=0.0, lt=1.0)] | None, _OPTIONAL]
ShareOrNone = Annotated[Nucleus | None, _OPTIONAL]
CountOrNone = Annotated[Count | None, _OPTIONAL]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]


_LARGEST_NUMBER, _LARGEST_COUNT, _LARGEST_BYTES = 1e9, 2**31 - 1, 2**63 - 1


def _is_wide(name: str | None) -> bool:
    """Return whether an integer field takes 64 bits: seeds and sizes. Torch takes no larger seed."""
    return name in ("seed", "memory_budget")


class Section(BaseModel):
    """Base of all sections: frozen, rejects unknown keys, and uses field docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_no_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Let `--set seeds=none` reset a recipe's text to empty."""
        is_text = info.field_name in cls.model_fields and cls.model_fields[info.field_name].annotation is str
        return "" if value is None and is_text else value

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers that would overflow 32 bits during a run, and text with control characters."""
        if isinstance(value, float) and abs(value) > _LARGEST_NUMBER:
            raise ValueError(f"must be between -{_LARGEST_NUMBER:g} and {_LARGEST_NUMBER:g}")
        if isinstance(value, int) and abs(value) > (_LARGEST_BYTES if _is_wide(info.field_name) else _LARGEST_COUNT):
            raise ValueError(f"must be at most {_LARGEST_BYTES if _is_wide(info.field_name) else _LARGEST_COUNT:,}")
        keep = "\n\t" if info.field_name == "system" else ""  # a system prompt may have several lines
        if isinstance(value, str) and visible(value, keep) != value:
            raise ValueError("must not contain control characters")
        return value
