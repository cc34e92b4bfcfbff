"""Gemma's SentencePiece tokenizer, made safe for text from strangers.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226) matches user-defined pieces wherever they
occur in a text. Gemma's control pieces, `<start_of_turn>` among them, are user-defined, so a user
could type one and speak as the model. Here they are retyped as control pieces, which no text ever
becomes; only code asks for them, by id. HTML tags and white-space runs stay user-defined, as trained.
U+2581 in a text is a space: SentencePiece writes spaces so, and cannot tell the two apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as proto

from wicore.errors import CheckpointError

_CONTROL_PIECE = re.compile(
    r"<(?:start|end)_of_(?:turn|image)>|<image_soft_token>|<mask>|<unused\d+>|\[multimodal\]"
)
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"


class Tokenizer:
    """Text to ids and back. Immutable and thread-safe.

    Attributes:
        longest_piece: bytes of the longest piece: n bytes of text are at least n / longest_piece tokens.
        vocab_size: number of pieces; the model's table may have more rows, which no text uses.
        bos, eos, start_of_turn, end_of_turn: ids of the control pieces.
    """

    def __init__(self, processor: Any, piece_bytes: list[bytes], ids: dict[str, int]) -> None:
        self._processor = processor
        self._piece_bytes = piece_bytes
        self._ids = ids
        self.vocab_size = len(piece_bytes)
        self.longest_piece = max(map(len, piece_bytes))
        self.bos = self._required("<bos>")
        self.eos = self._required("<eos>")
        self.start_of_turn = self._required("<start_of_turn>")
        self.end_of_turn = self._required("<end_of_turn>")

    @classmethod
    def from_model_bytes(cls, data: bytes) -> Tokenizer:
        """From the content of a tokenizer.model.

        Raises CheckpointError when it is not a SentencePiece model or lacks Gemma's control pieces.
        """
        model: Any = proto.ModelProto()  # type: ignore[attr-defined]  # generated at import
        try:
            model.ParseFromString(data)
            return cls._from_proto(model)
        except (DecodeError, RuntimeError, ValueError) as err:
            raise CheckpointError(f"tokenizer.model: expected a SentencePiece model, found: {err}") from None

    @classmethod
    def _from_proto(cls, model: Any) -> Tokenizer:
        ids: dict[str, int] = {}
        piece_bytes: list[bytes] = []
        for i, piece in enumerate(model.pieces):
            if piece.type == _USER_DEFINED and _CONTROL_PIECE.fullmatch(piece.piece):
                piece.type = _CONTROL
            if piece.type in (_CONTROL, _UNKNOWN):
                ids[piece.piece] = i
            piece_bytes.append(_bytes_of(piece.piece, piece.type))
        if not piece_bytes:
            raise CheckpointError("tokenizer.model: expected a SentencePiece model, found no pieces")
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model.SerializeToString())
        return cls(processor, piece_bytes, ids)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of a text, none of them a control piece, after <bos> if asked."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return [self.bos, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control pieces are empty, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece_bytes(i) for i in ids).decode("utf-8", "replace")

    def piece_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to the text, perhaps part of a character.

        Empty for control pieces and for the rows that pad a model's table beyond the vocabulary.
        """
        return self._piece_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def control_id(self, piece: str) -> int | None:
        """Id of a control piece such as "<start_of_image>"; None when the vocabulary has none."""
        return self._ids.get(piece)

    def _required(self, piece: str) -> int:
        if piece not in self._ids:
            raise CheckpointError(f"tokenizer.model: expected the control piece {piece}, found none")
        return self._ids[piece]


def _bytes_of(piece: str, kind: int) -> bytes:
    if kind in (_CONTROL, _UNKNOWN):
        return b""
    if kind == _BYTE:
        return bytes([int(piece[3:-1], 16)])  # <0xAB>
    return piece.replace(_SPACE, " ").encode()
