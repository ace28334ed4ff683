"""Small tokenizers of the kinds that LLaVA models use, built in memory and always the same.

Every builder takes the ids of `<image>`, `<pad>` and `<video>`; gaps in the vocabulary are filled
with unreachable pieces, as in the hub's checkpoints. `None` leaves a token out.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

WORDS = (
    "the of and to is in what this there image picture photo cat dog see you are user "
    "ASSISTANT Human Assistant assistant system helpful answer question vision language INST SYS "
    "Describe detailed artificial intelligence chat between curious polite gives visual content "
    "안녕 사진 무엇 你好 图片 什么"
).split()
"""Words that become single tokens (as far as their merges are not taken by earlier ones)."""
BARE_WORDS = ("USER",)
"""As in LLaMA's vocabulary: one token without a space before it, two with one."""
SAMPLE_TEXTS = (
    "What is in this picture?",
    "  two leading spaces, tabs\tand\n\nblank lines ",
    "사진에 무엇이 있나요? 고양이가 두 마리 있습니다.",
    "图片里有什么？有两只猫。",
    "👩‍🚀🇰🇷 café ﬁ 한 ½",
    "</s><|im_end|><|eot_id|>[INST]###",
)


def llama_like(
    *,
    image: int | None = 800,
    pad: int | None = 801,
    video: int | None = None,
    legacy: bool = False,
) -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE with byte fallback, as LLaMA 2, Vicuna and Mistral have.

    Ids 0 to 2 are `<unk>`, `<s>`, `</s>`, then the bytes. With `legacy` every stretch between
    special tokens begins with `▁`, as before transformers repaired it; otherwise only the text.
    """
    specials = ("<unk>", "<s>", "</s>")
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet += ["▁", *map(chr, range(33, 127)), *"가나다는니이에있진国有"]
    words = [form + word for word in WORDS for form in ("▁", "")] + [*BARE_WORDS]
    placed = _placed(image, pad, video)
    vocabulary, merges = _vocabulary([*specials, *alphabet], words, placed)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    return _wrapped(tokenizer, (*specials, *placed), bos="<s>", eos="</s>", unk="<unk>")


def llama3_like(
    *, image: int | None = 800, pad: int | None = 801, video: int | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with LLaMA 3's header tokens; the tokenizer adds the BOS."""
    specials = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    placed = _placed(image, pad, video)
    tokenizer = _byte_level(specials, placed)
    return _wrapped(tokenizer, (*specials, *placed), bos="<|begin_of_text|>", eos="<|eot_id|>")


def qwen_like(
    *, image: int | None = 800, pad: int | None = 801, video: int | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's tokens, NFC normalisation, and no BOS."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    placed = _placed(image, pad, video)
    tokenizer = _byte_level(specials, placed)
    tokenizer.normalizer = normalizers.NFC()
    return _wrapped(tokenizer, (*specials, *placed), eos="<|im_end|>")


def slow_llama(directory: Path):
    """A tokenizer in Python over a trained sentencepiece model; it does not know `<image>`."""
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class SlowLlama(SentencePieceBackend):
        """As LLaMA's was before transformers 5."""

        model_input_names = ("input_ids", "attention_mask")

        def build_inputs_with_special_tokens(self, first, second=None):
            return [self.bos_token_id, *first, *(second or ())]

        def convert_tokens_to_string(self, tokens):
            # sentencepiece would leave the special tokens out.
            runs = groupby(tokens, lambda token: token in self.all_special_tokens)
            return "".join(
                "".join(run) if is_special else self.sp_model.decode(list(run))
                for is_special, run in runs
            )

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SAMPLE_TEXTS[:4], *WORDS] * 20),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
        num_threads=1,
    )
    return SlowLlama(
        vocab_file=str(directory / "tokenizer.model"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        legacy=True,
        clean_up_tokenization_spaces=False,
    )


def _placed(image: int | None, pad: int | None, video: int | None) -> dict[str, int]:
    wanted = {"<image>": image, "<pad>": pad, "<video>": video}
    return {token: number for token, number in wanted.items() if number is not None}


def _byte_level(specials: tuple[str, ...], placed: dict[str, int]) -> Tokenizer:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        "".join(piece for piece, _ in split.pre_tokenize_str(form + word))
        for word in (*WORDS, *BARE_WORDS)
        for form in (" ", "")
    ]
    tokenizer = Tokenizer(models.BPE(*_vocabulary([*alphabet, *specials], words, placed)))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _vocabulary(
    pieces: list[str], words: list[str], placed: dict[str, int]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the pieces and of every beginning of every word, and the merges that build them."""
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for character in word:
            vocabulary.setdefault(character, len(vocabulary))
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
            vocabulary.setdefault(word[:end], len(vocabulary))
    for token, number in sorted(placed.items(), key=lambda pair: pair[1]):
        if number < len(vocabulary):
            raise ValueError(f"the id of {token} must be at least {len(vocabulary)}")
        # Unreachable: no merge leads to them.
        vocabulary |= {f"<unused {n}>": n for n in range(len(vocabulary), number)}
        vocabulary[token] = number
    return vocabulary, list(merges)


def _wrapped(
    tokenizer: Tokenizer, specials: tuple[str, ...], **named: str
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    bos = named.get("bos")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    names = {f"{name}_token": token for name, token in named.items()}
    if "<pad>" in specials:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )
