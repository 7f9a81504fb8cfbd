"""What the schemas of all scripts are made of, and how values are checked against one. Imports no torch.

What leaves `checked` is frozen and valid.
"""

import os
from typing import Annotated, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from modeling.system.credentials import masked
from modeling.system.errors import UserError
from modeling.system.overrides import known_keys, nearest, override

SchemaType = TypeVar("SchemaType", bound=BaseModel)

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]  # 30 years; the system's timers end somewhere above
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[  # `~` is the home folder
    Text, AfterValidator(os.path.expanduser), Field(json_schema_extra={"format": "path"})
]

_MISSING = "missing, expected a value"


class Section(BaseModel):
    """A part of a configuration. The text under each key is its meaning, in `--help` and docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def _require(self, choice: str, keys: tuple[str, ...], needed: tuple[str, ...]) -> None:
        """Of the keys that depend on a choice, those that it needs must have a value and the others must be null."""
        for key in needed:
            if getattr(self, key) is None:
                group, name = choice.partition(".")[0], choice.partition("=")[2]
                raise ValueError(f"{key} needs a value with {choice}; `{group}={name}` on a command line sets it")
        for key in keys:
            if key not in needed and (value := getattr(self, key)) is not None:
                raise ValueError(f"{key} must be null with {choice}, got {value}")


def _line(error: ErrorDetails, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; the nearest known one is {nearest(key, [*known_keys(schema)])}"
    if error["type"] == "missing":
        return f"{key}: {_MISSING}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], (dict, BaseModel)):
        return f"{key}: {message}" if key else message  # a check across keys names the values itself
    line = f"{key}={error['input']}: {message[0].lower()}{message[1:]}"
    is_number = error["type"] == "string_type" and type(error["input"]) in (int, float)
    return f"{line}; as text it is written {override(key, str(error['input']))}" if is_number else line


def _reject_secrets(values: object, key: str = "") -> None:
    """A value is written into files that people share, so none may be an API key; it is not repeated in the error."""
    if isinstance(values, dict):
        for name, value in values.items():
            _reject_secrets(str(name), key)
            _reject_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _reject_secrets(value, key)
    elif isinstance(values, str) and masked(values) != values:
        raise UserError(
            f"{key}: looks like an API key, which runs write into their files: use `wandb login` (a commit's hash "
            "looks the same)"
        )


def checked(values: DictConfig | ListConfig | dict, schema: type[SchemaType]) -> SchemaType:
    """Composed values, if they fit the schema.

    Raises:
        UserError: one line for each error, with the key, what was got and what was expected.
    """
    try:
        is_plain = isinstance(values, dict)
        plain = values if is_plain else OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
        _reject_secrets(plain)
        return schema.model_validate(plain)
    except OmegaConfBaseException as error:
        is_missing = isinstance(error, MissingMandatoryValue)
        raise UserError(f"{error.full_key}: {_MISSING if is_missing else str(error).splitlines()[0]}") from error
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_line(entry, schema) for entry in error.errors()))) from error
