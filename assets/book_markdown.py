"""GitHub's Markdown as HTML: its dialect, its anchors of headings, code in colours.

The generator of the book reads another dialect (Python-Markdown), in which many a list and each
code block inside of a list would look different. So the pages reach it as HTML.
"""

import html
import json
import re
from itertools import groupby

from markdown_it import MarkdownIt
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

WIDGET = re.compile(r"<!-- widget: (\w+)((?: \w+=\S+)*) -->\s*")
COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)


class Document:
    """A text in GitHub's Markdown."""

    def __init__(self, text):
        self.tokens = PARSER.parse(text)
        self.anchors = {}  # {anchor: text of its heading}
        for opened, inline in zip(self.tokens, self.tokens[1:], strict=False):
            if opened.type == "heading_open":
                opened.attrSet("id", self.anchor(words(inline)))

    def anchor(self, heading):
        """What GitHub calls a heading; the second of a name ends with -1, the third with -2."""
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        anchor, again = slug, 0
        while anchor in self.anchors:
            again += 1
            anchor = f"{slug}-{again}"
        self.anchors[anchor] = heading
        return anchor

    def html(self, address, size=lambda picture: {}):
        """The page. `address(link, line)` is where a link or a picture leads in the book; without
        one (None) a link becomes plain text. `size(picture)` is what the page says of its size."""
        line = 1
        for token in self.tokens:
            line = token.map[0] + 1 if token.map else line
            opened = []
            for child in token.children or ():
                if child.type == "link_open":
                    opened.append(mended(child, "href", address, line))
                elif child.type == "link_close":
                    child.hidden = opened.pop().hidden
                elif child.type == "image":
                    child.attrs.update(size(child.attrGet("src")))
                    mended(child, "src", address, line)
        return PARSER.renderer.render(self.tokens, PARSER.options, {})


def mended(token, name, address, line):
    """Put the address that the book has into a link or a picture."""
    there = address(token.attrGet(name), line)
    token.hidden = there is None
    token.attrSet(name, there or "")
    return token


def words(inline):
    """The text of a heading, without its signs."""
    return "".join(child.content for child in inline.children if child.type != "html_inline")


# --- how some parts look --------------------------------------------------------------------------


def heading_end(renderer, tokens, index, options, env):
    return f"{link_to_itself(tokens[index - 2].attrGet('id'))}</{tokens[index].tag}>\n"


def link_to_itself(anchor):
    """What stands at the end of a heading."""
    return f'<a class="headerlink" href="#{anchor}" aria-label="link to this heading">#</a>'


def marked(text):
    """A line of text as HTML: code in it stands between `…`."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def table_start(renderer, tokens, index, options, env):
    return '<div class="table"><table class="data">\n'


def table_end(renderer, tokens, index, options, env):
    return "</table></div>\n"


def comments(renderer, tokens, index, options, env):
    """HTML as it is, without comments; one of them asks for a widget in place of a picture."""
    found = WIDGET.fullmatch(tokens[index].content)
    if not found:
        return COMMENT.sub("", tokens[index].content)
    tokens[index + 1].attrSet("class", "still")  # the paragraph with the picture
    return widget(*found.groups()) + "\n"


def widget(name, options):
    """Where GitHub shows a picture, the book has a widget; print has the picture."""
    given = json.dumps(dict(option.split("=", 1) for option in options.split()))
    return f'<div id="{name}" data-widget="{name}" data-options="{html.escape(given)}"></div>'


def code_inline(renderer, tokens, index, options, env):
    """Code in a line: a browser would break a flag behind its hyphens."""
    words = html.escape(tokens[index].content, quote=False).split(" ")
    whole = [
        f'<span class="whole">{word}</span>' if "-" in word and len(word) <= 32 else word
        for word in words
    ]
    return f"<code>{' '.join(whole)}</code>"


def fence(renderer, tokens, index, options, env):
    language = tokens[index].info.split() or [""]
    return code_block(tokens[index].content, language[0])


PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
for kind, rule in {
    "heading_close": heading_end, "table_open": table_start, "table_close": table_end,
    "html_block": comments, "html_inline": comments, "code_inline": code_inline, "fence": fence,
    "code_block": fence,
}.items():  # fmt: skip
    PARSER.add_render_rule(kind, rule)


# --- code in colours ------------------------------------------------------------------------------


def code_block(code, language):
    lines = changed_lines(code) if language == "diff" else coloured(code, language)
    return f'<div class="highlight"><pre><code>{"".join(lines)}</code></pre></div>\n'


def coloured(code, language):
    """The lines of a text as HTML, each with its end. Unknown languages stay as they are."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=True)
    except ClassNotFound:
        return html.escape(code, quote=False).splitlines(keepends=True)
    kinds = ((colour(STANDARD_TYPES.get(kind, "")), text) for kind, text in lexer.get_tokens(code))
    lines = [""]
    for name, same in groupby(kinds, key=lambda token: token[0]):
        whole = html.escape("".join(text for _, text in same), quote=False)
        for i, part in enumerate(whole.split("\n")):
            if i:
                lines[-1] += "\n"
                lines.append("")
            lines[-1] += f'<span class="{name}">{part}</span>' if name and part.strip() else part
    return lines[:-1] if not lines[-1] else lines


def colour(kind):
    """The class of a token: few colours, as most names and signs need none."""
    if kind in ("ow", "nb", "bp", "nd", "nf", "nc", "sd", "nt", "gp"):
        return {"ow": "k", "bp": "nb"}.get(kind, kind)
    return kind[:1] if kind[:1] in ("k", "s", "m", "c") else ""


def changed_lines(code):
    """A diff of Python: its lines in the colours of Python, on those of a diff."""
    done = []
    for part in re.split(r"(?<=\n)( {4}\.\.\.\n)", code):  # hunks, and what lies between them
        lines = part.splitlines()
        inner = coloured("\n".join(line[1:] for line in lines), "python")
        for line, text in zip(lines, inner, strict=True):
            kind = {"+": " added", "-": " deleted"}.get(line[:1], "")
            done.append(f'<span class="line{kind}">{line[:1]}{text}</span>')
    return done
