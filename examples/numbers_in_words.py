"""Numbers in French and in English words, as a small translation task.

French counts by twenties in places (97 is "quatre-vingt-dix-sept"), joins by "et" in
others, and puts no "one" before "cent" and "mille", so that characters do not map one
to one. All numbers below 10,000, of which 500 are for testing.
"""

import numpy as np

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
ENGLISH_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
FRENCH = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze "
    "quinze seize dix-sept dix-huit dix-neuf"
).split()
FRENCH_TENS = "- - vingt trente quarante cinquante soixante".split()

PADDING, START, END = range(3)
LENGTH = 48  # characters of the longest, with room for START and END
CHARACTERS = " -abcdefghijklmnopqrstuvwxyzé"
VOCABULARY = 3 + len(CHARACTERS)


def english(n):
    """Returns a number below 10,000 in English."""
    parts = []
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            parts += [ENGLISH[n // size], word]
            n %= size
    if n >= 20:
        tens, ones = divmod(n, 10)
        parts.append(ENGLISH_TENS[tens] + (f"-{ENGLISH[ones]}" if ones else ""))
    elif n or not parts:
        parts.append(ENGLISH[n])
    return " ".join(parts)


def french(n):
    """Returns a number below 10,000 in French."""
    parts = []
    if n >= 1000:
        parts += ([] if n < 2000 else [FRENCH[n // 1000]]) + ["mille"]
        n %= 1000
    if n >= 100:
        hundreds, n = divmod(n, 100)
        parts += [] if hundreds == 1 else [FRENCH[hundreds]]
        parts.append("cents" if hundreds > 1 and n == 0 else "cent")
    if n or not parts:
        parts.append(_french_below_100(n))
    return " ".join(parts)


def _french_below_100(n):
    if n < 20:
        return FRENCH[n]
    if n >= 80:
        return f"quatre-vingt-{FRENCH[n - 80]}" if n > 80 else "quatre-vingts"
    tens = min(n // 10, 6)
    ones = n - 10 * tens  # up to 19 after sixty
    if ones == 0:
        return FRENCH_TENS[tens]
    if ones in (1, 11):
        return f"{FRENCH_TENS[tens]} et {FRENCH[ones]}"
    return f"{FRENCH_TENS[tens]}-{FRENCH[ones]}"


def encode(texts):
    """Returns (batch, LENGTH) of START, characters, END and PADDING."""
    tokens = np.full((len(texts), LENGTH), PADDING, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        codes = [3 + CHARACTERS.index(c) for c in text]
        row[: len(codes) + 2] = [START, *codes, END]
    return tokens


def decode(tokens):
    """Returns the texts of (batch, length) tokens, up to END."""
    texts = []
    for row in np.asarray(tokens).tolist():
        row = row[: row.index(END)] if END in row else row
        texts.append("".join(CHARACTERS[t - 3] for t in row if t > END))
    return texts


def load_split():
    """Returns French and English tokens for training, and the same for testing."""
    numbers = np.random.default_rng(0).permutation(10_000)
    train, test = numbers[500:], numbers[:500]
    return tuple(
        encode([language(int(n)) for n in part])
        for part in (train, test)
        for language in (french, english)
    )
