"""The text of one answer, as its tokens arrive."""

from tokenizers.decoders import DecodeStream

from nf_runtime.tokenizer import Tokenizer

# Prompt tokens that a decoder needs to see to join the answer's first token to the prompt.
_CONTEXT_TOKENS = 8

# What a decoder shows for the beginning of a character.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text without ever splitting a character, and looks for stop strings.

    Text that may be the beginning of a stop string is held back until that is decided.

    Attributes:
        stopped_by: The stop string that was found, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        *,
        stop: list[str],
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.stopped_by: str | None = None
        self._backend = tokenizer.backend
        self._skip_special_tokens = skip_special_tokens
        self._decoder = self._decode_after(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Take a token and give the text that is certain now; sets `stopped_by` at a stop string.

        Args:
            token_id: The next token.
            check_stop: False while the answer is too short to stop. A stop string that this token
                completes is then text as any other; one that it begins may be completed later.
        """
        piece = self._decode(token_id)
        if not self._stop:
            return piece
        return self._search(piece, check_stop)

    def finish(self) -> str:
        """Give the text held back, once no token follows."""
        return self._give(self._held)

    def _decode_after(self, context: list[int]) -> DecodeStream:
        """A decoder for what follows some tokens, whose last character may be incomplete."""
        whole = len(context)
        while whole and self._backend.decode(
            context[:whole], skip_special_tokens=self._skip_special_tokens
        ).endswith(_INCOMPLETE):
            whole -= 1
        decoder = DecodeStream(ids=context[:whole], skip_special_tokens=self._skip_special_tokens)
        for token_id in context[whole:]:
            decoder.step(self._backend, token_id)
        return decoder

    def _decode(self, token_id: int) -> str:
        try:
            return self._backend_step(token_id)
        except Exception:  # the decoder gives up on byte sequences that are no text; begin afresh
            self._decoder = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._backend_step(token_id)

    def _backend_step(self, token_id: int) -> str:
        return self._decoder.step(self._backend, token_id) or ""

    def _search(self, piece: str, check_stop: bool) -> str:
        buffer = self._held + piece
        found = []
        if check_stop:
            for stop in self._stop:
                # Only what ends within `piece`: what was complete before came too early to count.
                at = buffer.find(stop, max(0, len(self._held) + 1 - len(stop)))
                if at >= 0:
                    found.append((at, stop))
        if found:
            at, self.stopped_by = min(found)
            end = at + len(self.stopped_by) if self._include_stop else at
            return self._give(buffer[:end])
        longest = max(map(len, self._stop)) - 1
        for held in range(min(longest, len(buffer)), 0, -1):
            tail = buffer[-held:]
            if any(held < len(stop) and stop.startswith(tail) for stop in self._stop):
                given = self._give(buffer[:-held])
                self._held = tail
                return given
        return self._give(buffer)

    def _give(self, text: str) -> str:
        self._held = ""
        return text
