"""Content that is not text is refused by name: a model that reads text alone would learn to answer without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FIELDS = ("image", "images", "audio", "audios", "video", "videos", "pixel_values", "input_features")
"""Fields of a record, or of a message, that hold it."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a message's parts that are text."""

PLACEHOLDER = re.compile(
    r"<\|(?:image|audio|video|vision)(?:_\w+)?(?:_\d+)?\|>|<\|vision_start\|>|\[IMG\]|<start_of_image>|<image_soft_token>"
    r"|<(?P<placeholder>image|video|audio)>"
)
"""What stands in a text for content that is not text."""


def refuse_fields(fields: Mapping[str, Any], field: str = "") -> None:
    """Refuse what is not text among some fields.

    Args:
        fields: Of a record or of a message.
        field: The message's name and a dot.

    Raises:
        ValueError: There is some; the message names the field.
    """
    for name in [one for one in FIELDS if one in fields]:
        value = fields.get(name)
        if value is not None and value is not False and value != [] and value != "":
            raise ValueError(
                f"field `{field}{name}` holds content that is not text, which cannot be learnt from here; leave it out "
                f"with data.ignore_fields=[{name}]"
            )


def refuse_placeholders(text: str, field: str) -> None:
    """Refuse what stands in a text for content that is not text; an HTML element with its closing tag is text.

    Raises:
        ValueError: There is some; the message names field and placeholder.
    """
    for found in PLACEHOLDER.finditer(text):
        tag = found["placeholder"]
        if tag is None or f"</{tag}>" not in text:
            raise ValueError(f"field `{field}` holds {found[0]}, which stands for content that is not text")
