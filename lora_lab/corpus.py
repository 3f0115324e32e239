"""A folder of text as a language model needs it: split into training and held-out documents, tokenized, and priced by simpler predictors."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import atomic_write

END = "<|endoftext|>"



@dataclass(frozen=True)
class Corpus:
    """Encoded text: `train` and `held` are streams of token ids in which <|endoftext|> stands in front of each document."""

    tokenizer: object  # tokenizers.Tokenizer
    train: np.ndarray  # (N,) uint16
    held: np.ndarray  # (M,) uint16
    documents: list[str]
    held_documents: list[str]
    fingerprint: str

    @property
    def end(self) -> int:
        return self.tokenizer.token_to_id(END)

    def bytes_of(self) -> np.ndarray:
        """(vocab,) how many bytes of text each token stands for. In byte-level BPE one character of a token is one byte."""
        size = self.tokenizer.get_vocab_size()
        lengths = np.array([len(self.tokenizer.id_to_token(i)) for i in range(size)])
        lengths[self.end] = 0
        return lengths

    def held_text(self) -> bytes:
        return self.tokenizer.decode(self.held.tolist(), skip_special_tokens=True).encode()


def read_documents(folder: str | os.PathLike, megabytes: float = 0.0) -> Iterator[tuple[str, str]]:
    """(name, text) of each document in the folder's .txt and .txt.xz files, by file name; <|endoftext|> on a line of its own separates
    documents within a file. Stops before the document with which more than `megabytes` (10^6 bytes) would be read. Raises ValueError.
    """
    files = _text_files(folder)
    used, limit = 0, megabytes * 1e6 or math.inf
    for path in files:
        raw = _read(path)
        parts = [part for part in raw.split(f"{END}\n") if part.strip()]
        for number, text in enumerate(parts):
            used += len(text.encode()) + len(END) + 1
            if used - len(END) - 1 > limit:
                return
            yield (path.name if len(parts) == 1 else f"{path.name}#{number}"), text.removesuffix(END)


def _text_files(folder: str | os.PathLike) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder that holds the .txt or .txt.xz files")
    files = sorted(p for p in folder.iterdir() if p.is_file() and (p.name.endswith(".txt") or p.name.endswith(".txt.xz")))
    if not files:
        others = sorted(p.name for p in folder.iterdir())[:5]
        raise ValueError(f"{folder} has no .txt and no .txt.xz file" + (f"; found {', '.join(others)}" if others else ": it is empty"))
    return files


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as UTF-8 text ({error}): convert it, or take it out of the folder") from error


def prepare(
    folder: str | os.PathLike, work: str | os.PathLike, vocab: int, hold_out: int = 20, megabytes: float = 0.0, context: int = 256, say=print
) -> Corpus:
    """Split, learn a byte-level BPE of `vocab` tokens on every fourth training document, encode.

    One document in `hold_out` is never trained on, beginning with number hold_out / 2. All is kept in `work`, and made again when the text
    or these settings differ. Raises ValueError for text that can't be read or is too little (4 x `context` tokens on each side at least),
    OSError when the disk is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    work = Path(work)
    digest = hashlib.sha256(json.dumps([vocab, hold_out, megabytes]).encode())
    for path in _text_files(folder):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    fingerprint = digest.hexdigest()[:16]
    card = work / "corpus.json"
    if card.is_file():
        known = json.loads(card.read_text(encoding="utf-8"))
        if known["fingerprint"] == fingerprint:
            return load_corpus(work)

    documents = list(read_documents(folder, megabytes))
    held_out = [d for i, d in enumerate(documents) if i % hold_out == hold_out // 2]
    training = [d for i, d in enumerate(documents) if i % hold_out != hold_out // 2]
    if not held_out or not training:
        raise ValueError(
            f"{folder}: {len(documents)} document(s) can't be split into training and held-out ones with hold_out={hold_out}. "
            f"Give more files, separate documents in a file by lines of {END}, or lower hold_out (2 at least)"
        )
    size = sum(len(text.encode()) for _, text in documents)
    need_disk(work, size)  # two bytes a token, two bytes of text a token at least
    say(f"{len(training)} documents to train on, {len(held_out)} held out, {size / 1e6:.1f} MB; learning {vocab} tokens ...")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((line for _, text in training[::4] for line in text.split("\n")), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab:
        raise ValueError(f"{folder} has too little text for {vocab} tokens: byte pairs ran out at {found}. Set vocab to {found} or less")
    streams = []
    for name, part in (("train", training), ("held", held_out)):
        stream = encode(tokenizer, (text for _, text in part))
        if len(stream) < 4 * context:
            raise ValueError(f"{folder}: too little text: {len(stream)} {name} tokens, and a context of {context} needs {4 * context} at least")
        streams.append(stream)
    known = {"documents": [n for n, _ in training], "held_documents": [n for n, _ in held_out], "fingerprint": fingerprint}
    with atomic_write(work / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    for name, stream in zip(("train", "held"), streams, strict=True):
        with atomic_write(work / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, stream)
    # Last: while it is missing, or of other text, nothing beside it counts.
    with atomic_write(card) as temporary:
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return Corpus(tokenizer, *streams, **known)


def load_corpus(work: Path) -> Corpus:
    """What `prepare` left in `work`; the streams stay on the disk until they are read."""
    from tokenizers import Tokenizer

    known = json.loads((work / "corpus.json").read_text(encoding="utf-8"))
    streams = (np.load(work / f"{name}.npy", mmap_mode="r") for name in ("train", "held"))
    return Corpus(Tokenizer.from_file(str(work / "tokenizer.json")), *streams, **known)


def encode(tokenizer, texts) -> np.ndarray:
    """(N,) uint16: each text with <|endoftext|> in front."""
    end, parts = tokenizer.token_to_id(END), []
    for text in texts:
        ids = [end]
        for line in tokenizer.encode_batch_fast([line + "\n" for line in text.split("\n")]):
            ids.extend(line.ids)
        parts.append(np.array(ids, dtype=np.uint16))
    return np.concatenate(parts)


def excerpt(stream: np.ndarray, end: int, most: int = 20_000) -> list[np.ndarray]:
    """The first `most` tokens of each document, so that a long book counts no more than a short one."""
    return [part[:most] for part in np.split(stream, np.flatnonzero(stream == end)[1:])]


def need_disk(work: Path, needed: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(f"{work} has {free / 1e6:.0f} MB free; this run needs about {needed / 1e6:.0f} MB. Choose another --work")


def yardsticks(train: np.ndarray, documents: Sequence[np.ndarray], bytes_of: np.ndarray, text: bytes) -> dict[str, float]:
    """Bits per byte of simpler predictors on the same documents.

    unigram   (c(b) + 1) / (N + vocab), counted over all training tokens
    bigram    absolute discounting: max(c(a, b) - 3/4, 0) / c(a) + 3/4 n(a) / c(a) unigram(b), n(a) the number of different tokens seen after a
    gzip, xz  at their strongest, over the documents one after the other; they have seen no training text
    """
    vocab, size = len(bytes_of), sum(int(bytes_of[d[1:]].sum()) for d in documents)
    counts = np.bincount(train, minlength=vocab)
    unigram = (counts + 1) / (len(train) + vocab)
    pairs, seen = np.unique(train[:-1].astype(np.uint32) * vocab + train[1:], return_counts=True)
    after = np.bincount(train[:-1], minlength=vocab)  # c(a), where something follows
    kinds = np.bincount((pairs // vocab).astype(np.int64), minlength=vocab)  # n(a)
    bits = {"unigram": 0.0, "bigram": 0.0}
    for document in documents:
        a, b = document[:-1].astype(np.uint32), document[1:]
        bits["unigram"] -= np.log2(unigram[b]).sum()
        where = np.searchsorted(pairs, a * vocab + b).clip(max=len(pairs) - 1)
        both = np.where(pairs[where] == a * vocab + b, seen[where], 0)
        known = after[a] > 0
        divisor = np.maximum(after[a], 1)
        p = np.where(known, np.maximum(both - 0.75, 0) / divisor + 0.75 * kinds[a] / divisor * unigram[b], unigram[b])
        bits["bigram"] -= np.log2(p).sum()
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {k: float(v / size) for k, v in bits.items()} | {k: 8 * len(v) / len(text) for k, v in packed.items()}
