"""Loads the files of images and sounds in chats and completions, and puts markers in place of them."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from msgspec import structs

from api.config.server import ServerConfig
from api.schema.request_values import ContentPart, ImageURL, PromptObject
from api.schema.requests import ChatMessageParam
from api.templates.media_urls import download_media
from engine import MAX_MEDIA_BYTES, WORKERS, MediaPrompt, MediaReader, RequestRefused, UnreadableMedia, checkpoint

IMAGE_PART, AUDIO_PART = "image_url", "input_audio"
# mtmd's default marker. It stands for a file in the prompt of a completion only, so it is no secret.
PROMPT_MARKER = "<__media__>"
_MAX_QUOTED_CHARS = 32
# Maximum length of a data URL before its comma.
_MAX_HEAD_CHARS = 1024
# The GIL is held while a piece is decoded, for about half a millisecond. A multiple of 4.
_BASE64_PIECE_CHARS = 2**17


class MediaFiles:
    """Loads the files of content parts, within the limits of the configuration."""

    def __init__(self, reader: MediaReader | None, config: ServerConfig) -> None:
        """`reader` is that of the engine; None if the model reads neither images nor sounds."""
        self._reader = reader
        self._config = config

    @property
    def vision(self) -> bool:
        """True if messages can have images."""
        return self._reader is not None and self._reader.vision

    @property
    def audio(self) -> bool:
        """True if messages can have sounds."""
        return self._reader is not None and self._reader.audio

    async def load(self, messages: Sequence[ChatMessageParam]) -> tuple[list[ChatMessageParam], list[bytes]]:
        """Returns the messages with a marker in place of each image and sound, and the files in the order of the
        markers. Raises RequestRefused, with the path of the refused part."""
        parts = [
            (part, f"messages[{index}].content[{number}]")
            for index, message in enumerate(messages)
            for number, part in enumerate(message.content if isinstance(message.content, list) else ())
            if part.type in (IMAGE_PART, AUDIO_PART)
        ]
        if not parts:
            return [*messages], []
        for part, path in parts:
            self._check_type(part, path)
        self.check_count(len(parts), "messages")
        files = [await self._file(part, path) for part, path in parts]
        assert self._reader is not None
        marker = self._reader.marker
        return [_with_markers(message, marker, f"messages[{index}]") for index, message in enumerate(messages)], files

    def check_count(self, count: int, field: str) -> None:
        """Raises RequestRefused if one request may not have `count` images and sounds."""
        if count > self._config.media_limit:
            raise RequestRefused(
                f"The request has {count} images and sounds; at most {self._config.media_limit} are accepted "
                "(--media-limit).",
                field=field,
            )

    def _check_type(self, part: ContentPart, path: str) -> None:
        is_image = part.type == IMAGE_PART
        if not (self.vision if is_image else self.audio):
            kind, files = ("image", "images") if is_image else ("audio", "sounds")
            # Begins with llama-server's message, because clients may match it.
            raise RequestRefused(
                f"{kind} input is not supported - hint: if this is unexpected, you may need to provide the mmproj. "
                f"This model reads no {files}: leave the part out.",
                field=f"{path}.type",
            )

    async def _file(self, part: ContentPart, path: str) -> bytes:
        source, field = _source(part, path)
        scheme, separator, rest = source.partition(":")
        match scheme.lower() if separator else "":
            case "data":
                return await _data_url(source, field)
            case "http" | "https":
                if not self._config.media_urls:
                    raise RequestRefused(
                        "This server downloads no files: send a data URL, or start the server with --media-urls.",
                        field=field,
                    )
                return await download_media(source, field)
            case "file":
                return await WORKERS.run(partial(self._local_file, rest, field))
            case "":
                return await _base64(source, field)
        raise RequestRefused(
            f"URLs of the scheme {scheme[:_MAX_QUOTED_CHARS]!r} are not supported; send a data URL.", field=field
        )

    def _local_file(self, rest: str, field: str) -> bytes:
        """Returns the content of a file below --media-path. `rest` is the URL after its scheme."""
        if not self._config.media_path:
            raise RequestRefused(
                "file:// URLs are not allowed unless --media-path is specified: send a data URL.", field=field
            )
        root = Path(self._config.media_path).resolve()
        name = rest.removeprefix("//").lstrip("/")
        try:
            file = (root / name).resolve()
            if file.is_relative_to(root) and file.is_file():
                with file.open("rb") as opened:
                    return opened.read(MAX_MEDIA_BYTES + 1)
        except (OSError, ValueError):
            pass
        raise RequestRefused("There is no such file below the folder of --media-path.", field=field)

    async def read(self, text: str, files: Sequence[bytes], field: str = "messages") -> MediaPrompt:
        """Returns the prompt of a text with a marker for each of `files`. Raises RequestRefused with `field`."""
        assert self._reader is not None, "files are loaded only with a reader"
        try:
            return await WORKERS.run(partial(self._reader.read, text, files))
        except UnreadableMedia as error:
            raise RequestRefused(str(error), field=field) from None

    def with_prompt_markers(self, text: str) -> str:
        """Returns a rendered text with `PROMPT_MARKER` in place of each file, as `read_prompt` expects it."""
        return text.replace(self._reader.marker, PROMPT_MARKER) if self._reader is not None else text

    async def read_prompt(self, prompt: PromptObject, path: str) -> MediaPrompt:
        """Returns a prompt with the files of `multimodal_data` in place of its markers `PROMPT_MARKER`. Raises
        RequestRefused; `path` is that of the prompt."""
        text, items, field = prompt.prompt_string, prompt.multimodal_data or (), f"{path}.multimodal_data"
        if self._reader is None:
            # Begins with llama-server's message, because clients may match it.
            raise RequestRefused(
                "Multimodal data provided, but model does not support multimodal requests. Leave multimodal_data out.",
                field=field,
            )
        if (markers := text.count(PROMPT_MARKER)) != len(items):
            raise RequestRefused(
                f"prompt_string has {markers} markers {PROMPT_MARKER} and multimodal_data {len(items)} files; send one "
                "marker for each file.",
                field=field,
            )
        files = [await _base64(item, f"{field}[{index}]") for index, item in enumerate(items)]
        return await self.read(text.replace(PROMPT_MARKER, self._reader.marker), files, field)


def _source(part: ContentPart, path: str) -> tuple[str, str]:
    """Returns the URL or the base64 text of a part, and the path of the field. Raises RequestRefused for neither."""
    if part.type == IMAGE_PART:
        url = part.image_url.url if isinstance(part.image_url, ImageURL) else part.image_url
        field = f"{path}.image_url"
    else:
        url = part.input_audio.data or part.input_audio.url if part.input_audio is not None else None
        field = f"{path}.input_audio"
    if not url:
        raise RequestRefused(f"{field}: the field is missing or empty; expected a URL or base64", field=field)
    return url, field


async def _data_url(url: str, field: str) -> bytes:
    """Returns the content of a data URL."""
    comma = url.find(",", 0, _MAX_HEAD_CHARS)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise RequestRefused("The data URL is not of the form data:image/png;base64,CONTENT.", field=field)
    return await _base64(url, field, comma + 1)


async def _base64(text: str, field: str, start: int = 0) -> bytes:
    """Returns the content of `text` from `start` on, decoded on a worker thread if it is long."""
    if 3 * (len(text) - start) // 4 > MAX_MEDIA_BYTES + 2:  # at most two characters are padding
        raise RequestRefused(
            f"The file has about {3 * (len(text) - start) // 4} bytes; at most {MAX_MEDIA_BYTES} are accepted.",
            field=field,
        )
    try:
        if len(text) - start <= _BASE64_PIECE_CHARS:
            return _decoded(text, start)
        return await WORKERS.run(_decoded, text, start)
    except ValueError as error:
        raise RequestRefused(
            f"The content is not valid base64: {error}. Send base64, or in a message a URL.", field=field
        ) from None


def _decoded(text: str, start: int) -> bytes:
    """Returns the bytes of the base64 in `text` from `start` on, decoded in pieces. Raises ValueError."""
    data = bytearray()
    for at in range(start, len(text), _BASE64_PIECE_CHARS):
        checkpoint()
        data += binascii.a2b_base64(text[at : at + _BASE64_PIECE_CHARS].encode("ascii"), strict_mode=True)
        if len(data) % 3 and at + _BASE64_PIECE_CHARS < len(text):
            raise ValueError("Excess data after padding")
    return bytes(data)


def _with_markers(message: ChatMessageParam, marker: str, path: str) -> ChatMessageParam:
    """Returns a message whose parts are joined to one text, with markers for images and sounds; a message without
    these is returned unchanged. As in llama-server, a line break separates two texts, and nothing separates a text and
    a marker. Raises RequestRefused; `path` is that of the message."""
    parts = message.content
    if not isinstance(parts, list) or not any(part.type in (IMAGE_PART, AUDIO_PART) for part in parts):
        return message
    text, after_marker = "", True
    for index, part in enumerate(parts):
        if part.type in (IMAGE_PART, AUDIO_PART):
            text, after_marker = text + marker, True
            continue
        if part.type != "text" or part.text is None:
            raise RequestRefused(
                f"Content parts of type {part.type[:_MAX_QUOTED_CHARS]!r} are not supported beside images and "
                "sounds, only 'text' with a text.",
                field=f"{path}.content[{index}].type",
            )
        text += part.text if after_marker or not text else f"\n{part.text}"
        after_marker = False
    return structs.replace(message, content=text)
