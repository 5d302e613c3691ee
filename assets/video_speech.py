"""Words for the ear: what a page says, sentence by sentence, as a voice can say it.

`sentences(markdown)` cuts a paragraph into sentences, each as it is written (for the captions) and
as it is spoken: `grad_x` becomes "grad x", `1/n` "1 over n". Nothing is left that is not a word, a
number or a pause.
"""

import re
from dataclasses import dataclass

# Names of the field, and how they are said. Whole words only, as they stand in the pages.
NAMES = {
    "seq": "sequence", "len": "length",
    "tp": "T P", "cp": "C P", "dp": "D P", "pp": "P P", "ep": "E P", "kv": "K V",
    "q": "Q", "k": "K",
    "lr": "learning rate", "dtype": "D type", "ctx": "context", "proj": "projection",
    "freq": "frequency", "init": "in it", "async": "A sync", "stdlib": "standard lib", "pg": "P G",
    "torchrun": "torch run", "pytest": "pie test", "py": "pie", "json": "jason", "npy": "N P Y",
    "numpy": "num pie", "gloo": "glue", "NCCL": "nickel", "CUDA": "kooda", "cuda": "kooda",
    "silu": "sigh loo", "SiLU": "sigh loo", "SwiGLU": "swish glue", "RoPE": "rope",
    "RMSNorm": "R M S norm", "MLP": "M L P", "GQA": "G Q A", "LM": "L M", "BPE": "B P E",
    "MFU": "M F U", "AFAB": "A fab", "1F1B": "one F one B", "AdamW": "Adam W", "ZeRO": "zero",
    "GPUs": "G P Us", "CPUs": "C P Us", "GPU": "G P U", "CPU": "C P U", "README": "read me",
    "SIGTERM": "sig term", "SIGINT": "sig int", "SIGUSR1": "sig user 1", "AND": "and",
    "logsumexp": "log sum exp", "wandb": "W and B", "attn": "attention", "args": "arguments",
    "MB": "megabytes", "GB": "gigabytes", "TB": "terabytes", "kB": "kilobytes",
    "ms": "milliseconds",
    "MiB": "mebibytes", "GiB": "gibibytes", "KiB": "kibibytes", "s/s": "seconds a second",
    "e.g.": "for example", "i.e.": "that is", "md": "M D", "Ctrl-C": "control C", "vs": "versus",
}  # fmt: skip
# What stands between words. A comma is a short pause.
SYMBOLS = {
    "√": " root ", "Σ": " the sum of ", "ᵀ": " transposed ", "·": " times ", "×": " times ",
    "*": " times ", "+": " plus ", "−": " minus ", "=": " equals ", "≠": " is not ",
    "%": " percent ",
    "≤": " is at most ", "≥": " is at least ", "<": " is less than ", ">": " is greater than ",
    "≈": " is about ", "∞": " infinity ", "→": " to ", "←": " from ", "±": " plus or minus ",
    "&": " and ", "@": " at ", "|": ", ", "…": ", and so on, ", "/": " over ", "~": " about ",
    "Δ": " delta ", "θ": " theta ", "ε": " epsilon ", "β": " beta ", "°": " degrees ", "₀": " 0 ",
    "₁": " 1 ", "₂": " 2 ", "₃": " 3 ", "ₙ": " n ", "ᵢ": " i ", "∂": " d ", "#": " number ",
    "^": " to the power of ", "\\": " ", "$": " ", "½": " one half ", "¼": " a quarter ",
}  # fmt: skip
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
SAYABLE = re.compile(r"[A-Za-z0-9 ,.;:?!'-]*")
END = re.compile(r"(?<=[.?!])(?<!e\.g\.)(?<!i\.e\.)(?<! vs\.)[)*_\"]*\s+")


@dataclass(frozen=True)
class Sentence:
    """A sentence as a page writes it, in Markdown, and as it is spoken."""

    markdown: str
    spoken: str

    @property
    def written(self):
        """The sentence without its marks, for a caption."""
        return plain(self.markdown)


def sentences(markdown):
    """The sentences of a paragraph, those that have something to say."""
    text, kept = hide_code(" ".join(markdown.split()))
    parts, start = [], 0
    for end in [*(match.end() for match in END.finditer(text)), len(text)]:
        part = text[start:end].strip()
        start = end
        if balance(part) and parts:  # the end of a bracket or of stars that began before
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    made = [Sentence(shown := show_code(part, kept), say(shown)) for part in parts]
    return [sentence for sentence in made if re.search(r"[A-Za-z0-9]", sentence.spoken)]


def balance(part):
    """Whether a part closes a bracket that it has not opened."""
    depth = 0
    for letter in part:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return True
    return False


def hide_code(text):
    """Put one letter of no language for each piece of code, so that its dots end no sentence."""
    kept = []

    def hide(match):
        kept.append(match[0])
        return chr(0xE000 + len(kept) - 1)

    return re.sub(r"`[^`]+`", hide, text), kept


def show_code(text, kept):
    return re.sub("[\ue000-\uf8ff]", lambda match: kept[ord(match[0]) - 0xE000], text)


def plain(markdown):
    """Markdown without links, stars and ticks."""
    text, kept = hide_code(without_links(markdown))
    text = re.sub(r"\*+|(?<!\w)_|_(?!\w)|</?\w+>", "", text)
    return show_code(text, [code.strip("`") for code in kept]).strip()


def without_links(markdown):
    return re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", markdown)


# --- for the ear ----------------------------------------------------------------------------------


def say(markdown):
    """A sentence of Markdown as it is spoken."""
    markdown = re.sub(
        r"\s*\((see )?\[[^\]]*\]\([^)]*\)\)", "", markdown
    )  # (a link) is to be clicked
    text, kept = hide_code(without_links(markdown))
    text = re.sub(r"\*+|(?<!\w)_|_(?!\w)|</?\w+>", "", text)
    text = re.sub(r"(?<=[a-z])/(?=[a-z])", " ", text).replace("×", " by ")  # key/value, 2 × 2
    text = re.sub(r"(?<=\d) \((?=[^()]* [+−] )", " times (", text)  # 3 (p − r)
    text = re.sub(r"\s*\(([^()]*)\)", r", \1,", text)  # a bracket is a pause
    text = re.sub(r"\s*\[([^\]]*)\]", r", \1,", text)
    said = show_code(text, [f" {say_code(code.strip('`'))} " for code in kept])
    return tidy(words(said))


def say_code(code):
    """A piece of code as one reads it to somebody who sees it too."""
    code = re.sub(r"(?<!\w)--(?=\w)", "", code)  # a flag is its name
    code = re.sub(r"[\"'{}]|\(…\)", " ", code)
    code = re.sub(r"^\s*\[([^\[\]]*)\]\s*$", lambda m: m[1].replace(",", " by "), code)  # a shape
    code = re.sub(r"\[([^\[\]]*)\]", lambda m: f" at {slices(m[1])}, ", code)
    code = re.sub(r"\(\s*\)", " ", code)
    code = re.sub(r"\.to\(", " dot to ", code)
    code = re.sub(r"(?<=\w)\((?=\S)", " of ", code)
    code = re.sub(r"==", " equals ", code)
    code = re.sub(r"://", " ", code)
    code = re.sub(r"[()]", ", ", code)
    code = re.sub(r"(?<=[A-Za-z_0-9])\.(?=[A-Za-z_])|^\.(?=\w)", " dot ", code)
    code = re.sub(r"(?<=\s)-(?=\s)", " minus ", code)
    code = re.sub(r"\*\*", " to the power of ", code)
    code = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", code)  # ColumnParallel
    code = re.sub(r"(?<=[A-Z])(?=[A-Z][a-z])(?<!NCC)", " ", code)
    return code.replace(":", ", ")


def slices(index):
    """The index of a tensor: a colon alone is all of a dimension."""
    parts = (part.strip() for part in index.split(","))
    said = (re.sub(r"^:$", "all", part) for part in parts)
    said = (re.sub(r"^:(.+)", r"up to \1", part) for part in said)
    return ", ".join(re.sub(r"(.+):$", r"from \1", part) for part in said)


def words(text):
    """Numbers, symbols and names of a text as words."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+)", lambda m: f" to the {m[1].translate(POWERS)} ", text)
    text = re.sub(r"\b(\d+(?:\.\d+)?)e(-?\d+)\b", r"\1 times 10 to the \2", text)
    text = re.sub(r"\b(\d+(?:\.\d+)?)([BKM])\b", r"\1 \2", text)  # Llama 3.1 8B
    text = re.sub(r"\b1/(?=\w)", "one over ", text)
    text = re.sub(r"(?<![\w'])-(?=\d)|(?<=\s)-(?=\s)", " minus ", text)
    text = re.sub(r"(?<![\w.])([\w/.-]*[\w/])(?!\w)", lambda m: named(m[1]), text)
    text = re.sub(r"_", " ", text)
    text = re.sub(r"\b([A-Za-z]{3,})(\d+)\b", r"\1 \2", text).replace("bfloat", "B float")
    text = re.sub(r"\b(\d+)([a-z])\b", r"\1 \2", text)  # 2n
    for symbol, word in SYMBOLS.items():
        text = text.replace(symbol, word)
    return text


def named(word):
    """A word, or the parts of a word with a hyphen or a dot, by the names that are known."""
    if word in NAMES:
        return NAMES[word]
    if re.fullmatch(r"[\d.]+", word):
        return word
    if re.fullmatch(r"[\w-]+\.(py|md|json|npy|txt)", word):  # a file that stands in the prose
        word = word.replace("_", " ").replace(".", " dot ")
    return re.sub(r"[A-Za-z0-9]+", lambda m: NAMES.get(m[0], m[0]), word)


def tidy(text):
    """One space between words, at most one pause at a place, and nothing that cannot be said."""
    text = re.sub(r"[–—]", ", ", text).replace("’", "'").replace("“", "").replace("”", "")
    text = re.sub(r"[^A-Za-z0-9 ,.;:?!'-]", " ", text)
    text = re.sub(r"(?<![A-Za-z0-9])[-']|-(?![A-Za-z0-9])", " ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s*[,.;:?!]([ ,.;:?!]*[,.;:?!])?", lambda m: pause(m[0]), text)
    return text.strip(" ,;")


def pause(marks):
    """Of several marks in a row the one that ends a sentence, or the first."""
    marks = marks.replace(" ", "")
    return next((mark for mark in marks if mark in ".?!"), marks[0])
