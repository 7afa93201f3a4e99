"""The base of every configuration record."""

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """Frozen record that refuses unknown keys; a field's docstring is its help text."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )
