"""Small tokenizers of the kinds that real models use, made on the spot."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["the quick brown fox jumps over the lazy dog. Once upon a time, there was a stop sign, and more."] * 3
SPECIAL = ["<s>", "</s>", "<|end|>"]


@cache
def byte_level() -> Tokenizer:
    """Like Llama 3 and Qwen: every byte is in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _byte_level_by(pattern: str, *before: normalizers.Normalizer) -> Tokenizer:
    """Words are what `pattern` says, as in all that came after GPT-2."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if before:
        tokenizer.normalizer = normalizers.Sequence(list(before))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("brown fox", normalized=True)])
    return tokenizer


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def numbers_of_three() -> Tokenizer:
    """Like Llama 3."""
    return _byte_level_by(_WORDS % "{1,3}")


@cache
def composed_digits() -> Tokenizer:
    """Like Qwen: composed characters, one digit a word."""
    return _byte_level_by(_WORDS % "", normalizers.NFC())


@cache
def byte_fallback() -> Tokenizer:
    """Like Llama 2 and Mistral: words begin with a mark, unknown characters are bytes such as <0xE4>."""
    words = ["\u2581", "\u2581Hello", "\u2581there", "a", "b", "c", ",", "o", "e", "l", "H"]
    vocabulary = {token: at for at, token in enumerate(["<unk>", *SPECIAL])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *words]:
        vocabulary[token] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
