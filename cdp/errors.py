"""The exception tree. Every error a user can cause is one of these, and nothing else.

    CdpError
    ├── ConfigError    a setting is unknown, of the wrong type, or contradicts another (ValueError)
    ├── DataError      an image, table, label or vector is not what it should be (ValueError)
    ├── BackendError   a library or a device that was asked for cannot do its part
    └── StageError     a stage failed, or what it published is damaged

`CdpWarning` is no error: the library gives it by `warnings.warn` where a result is there but should
be looked at first.

The contract:
- A message says what was expected, what came, where, and what to do next.
- Wrong settings and wrong data are ValueErrors too, as scikit-learn's conventions ask.
- A message can be shown anywhere: what a terminal would obey (control characters of a hostile
  file name) and what no encoding takes stand in it as escapes.
- Library code raises; it never logs a failure and goes on.
"""


def make_printable(text: str) -> str:
    """Control characters other than newline, and lone surrogates, as backslash escapes."""
    return "".join(
        character
        if character == "\n" or character.isprintable()
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


class CdpError(Exception):
    """Anything that goes wrong for a reason the user can act on."""

    def __str__(self) -> str:
        return make_printable(super().__str__())


class ConfigError(CdpError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(CdpError, ValueError):
    """An image, table, label or vector is not what it should be."""


class BackendError(CdpError):
    """A library or device that was asked for cannot do its part."""


class CdpWarning(UserWarning):
    """A result that should be looked at before it is used; the text says why and what to do."""


class StageError(CdpError):
    """A stage failed, or what it published is damaged."""
