"""Which side of the train/val split a document falls on: a hash of what it shows, never of who drew it.

    "man farmer medium-dark skin tone" --concept_key--> "farmer" --is_held_out--> False: every farmer is in
    train

A concept comes in up to 25 skin tones, three genders, several hair styles and two directions, and every
vendor draws all of them. A split by file would hold out pictures whose twins were trained on, so it goes by
*concept*: the name with those words removed. Verses go by their chapter, so that its translations stay
together.

The split is fixed by the key, the fraction and the salt alone: adding a source or a vendor moves no document.
Text that names a held-out concept in passing (a verse with a lion) is not removed from training.
"""

import hashlib
import re

# Skin tones also stand in pairs ("couple with heart man man light skin tone dark skin tone").
_SKIN_TONE = re.compile(r"\b(?:(?:medium[- ])?(?:light|dark)|medium)[- ]skin[- ]tone\b")
_HAIR = re.compile(r"\b(?:(?:red|curly|white|blonde?)[- ]hair(?:ed)?|bald|beard(?:ed)?|blonde?)\b")
_DIRECTION = re.compile(r"\bfacing (?:right|left)\b")
# Different words for one concept. "person with crown" is the neutral prince; Mx Claus the neutral Santa.
_SYNONYMS = {
    "prince": "with crown",
    "princess": "with crown",
    "merman": "mermaid",
    "merperson": "mermaid",
    "older": "old",
    "santa": "",
    "mrs": "",
    "mx": "",
    "mr": "",
}
_GENDER = re.compile(r"(?:(?:wo)?m[ae]n|boys?|girls?|persons?|people|(?:fe)?male|adults?|child(?:ren)?)(?:'s)?")


def concept_key(name: str) -> str:
    """Split key of a picture's English name: lower case, without skin tone, gender, hair and direction words.

    "woman dark skin tone white hair" -> "person"; "couple with heart man man" -> "couple with heart".
    """
    text = name.lower().replace("_", " ").replace("\u2019", "'")
    for pattern in (_SKIN_TONE, _HAIR, _DIRECTION):
        text = pattern.sub(" ", text)
    words = (_SYNONYMS.get(word, word) for word in re.sub(r"[:,.()\u201c\u201d\"]", " ", text).split())
    # "and" only survives in "woman and man holding hands" and in lists, where it tells no concept apart.
    kept = [word for word in words if word and word != "and" and not _GENDER.fullmatch(word)]
    return " ".join(kept) or ("person" if name.strip() else "")


def is_held_out(key: str, fraction: float = 0.05, salt: str = "moma-split-1") -> bool:
    """Whether documents with this key go to val: the first 64 bits of sha256(salt:key) / 2^64 < fraction."""
    digest = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction
