"""Manual pages, Perl's pod and GNU info to text."""

from __future__ import annotations

import html
import re

from pages import Writer, decode, from_text

ROFF = {
    "em": "—",
    "en": "–",
    "aq": "'",
    "dq": '"',
    "lq": "“",
    "rq": "”",
    "oq": "‘",
    "cq": "’",
    "bu": "•",
    "co": "©",
    "mu": "×",
    "ha": "^",
    "ti": "~",
    "rs": "\\",
    "ga": "`",
    "hy": "-",
    "->": "→",
    "<=": "≤",
    ">=": "≥",
    "+-": "±",
    "de": "°",
    "Bq": "„",
    "Lq": "“",
    "Rq": "”",
    "Tm": "™",
    "ff": "ff",
    "fi": "fi",
    "fl": "fl",
    "sq": "'",
    "at": "@",
    "sh": "#",
    "ul": "_",
    "or": "|",
}
ESCAPE = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s(?:[-+]?\d{1,2}|\[[^]]*\])|\*?\((?P<two>..)|\*?\[(?P<long>[^]]*)\]|\*(?P<one>.)|\"(?P<rest>.*)|[mMhvwYFR](?:\[[^]]*\]|'[^']*')|(?P<other>.))"
)


def _roff(line: str) -> str:
    """A line of a man page without its escapes."""

    def one(match: re.Match[str]) -> str:
        if name := match["two"] or match["long"]:
            return ROFF.get(name, "")
        if other := match["other"]:
            return {"e": "\\", "-": "-", " ": " ", "~": " ", "0": " ", "\\": "\\", "'": "'", "`": "`", ".": "."}.get(
                other, ""
            )
        return ""

    return ESCAPE.sub(one, line)


def _arguments(line: str) -> list[str]:
    return [
        _roff(quoted.replace('""', '"') if quoted else plain)
        for quoted, plain in re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', line)
    ]


QUOTES = {
    "Dq": "“”",
    "Sq": "‘’",
    "Ql": "‘’",
    "Pq": "()",
    "Op": "[]",
    "Oo": "[",
    "Oc": "]",
    "Qq": '""',
    "Bq": "[]",
    "Aq": "<>",
    "Do": "“",
    "Dc": "”",
    "Po": "(",
    "Pc": ")",
    "So": "‘",
    "Sc": "’",
    "Brq": "{}",
}
CALLED = set(
    """
    Ad An Ar Cd Cm Dv Em Er Ev Fa Fl Fn Ft Ic Li Nm No Ns Pa Pf Sm Sx Sy Tn Va Vt Xr Lk Mt At Bx Fx Nx Ox In St Ux
    Xo Xc Fo Fc Ap Nd Rs Re %A %T %B %D %I %J %N %O %P %Q %R %V Bk Ek Lb D1 Dl Db Hf Ta
    """.split()  # noqa: SIM905
)


def _mdoc(arguments: list[str], page: str) -> str:
    """The words of one line of mdoc macros."""
    out, closing, tight = "", "", False
    macro = ""
    for word in arguments:
        if word in QUOTES or word in CALLED:
            macro = word
            marks = QUOTES.get(word, "")
            if len(marks) == 2:
                out, closing, tight = out + ("" if tight or not out else " ") + marks[0], marks[1] + closing, True
            elif marks:
                out, tight = out + ("" if tight or marks in "]”)’" else " ") + marks, marks in "[“(‘"
            elif word == "Ns":
                tight = True
            elif word == "Nm" and len(arguments) == 1:
                out += page
            elif word == "Fl" and arguments[-1] == "Fl":
                out += " -"
            continue
        if macro == "Fl" and word not in ".,:;)|":
            word = "-" + word
        if macro == "Xr" and word.isdigit():
            out, tight, macro = f"{out}({word})", False, ""
        elif word in ".,:;)?!":
            out += closing + word if word == arguments[-1] else word
            closing = "" if word == arguments[-1] else closing
        else:
            out += word if tight or not out else " " + word
        tight = word == "("
    return out + closing


def from_man(data: bytes) -> str:
    """A manual page in man(7) or mdoc(7); "" for one that only points to another. Tables and equations are left out."""
    out, literal, until, name = Writer(), False, "", ""
    for line in decode(data).split("\n"):
        if until:
            until = "" if line.startswith(until) else until
            continue
        if not line.startswith((".", "'")):
            out.line.append(_roff(line) + ("\n" if literal else " "))
            if not line.strip() and not literal:
                out.flush()
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        arguments = _arguments(rest)
        if macro.startswith(('\\"', "\\}")) or macro in (
            "Dd",
            "Os",
            "ad",
            "hy",
            "nh",
            "ne",
            "ta",
            "tr",
            "if",
            "ie",
            "el",
            "ds",
            "nr",
            "ft",
            "in",
            "ti",
        ):
            continue
        if macro == "so":
            return ""
        if macro in ("TS", "EQ", "de", "ig", "PS"):
            until = {"TS": ".TE", "EQ": ".EN", "PS": ".PE"}.get(macro, "..")
        elif macro in ("TH", "Dt"):
            name = arguments[0].lower() if arguments else ""
            out.blocks.append(f"{arguments[0]}({arguments[1]})" if len(arguments) > 1 else name)
        elif macro in ("nf", "EX", "fi", "EE", "Ed", "Bd", "SH", "SS", "Sh", "Ss"):
            out.literal() if literal else out.flush()
            literal = macro in ("nf", "EX") or (macro == "Bd" and ("-literal" in rest or "-unfilled" in rest))
            if macro in ("SH", "SS", "Sh", "Ss"):
                out.line.append(" ".join(arguments))
                if arguments:
                    out.flush()
        elif macro in (
            "PP",
            "P",
            "LP",
            "TP",
            "IP",
            "HP",
            "sp",
            "RS",
            "RE",
            "TQ",
            "Pp",
            "It",
            "Bl",
            "El",
            "br",
            "UE",
            "ME",
        ):
            if literal:
                out.line.append("\n")
            elif macro not in ("UE", "ME"):
                out.flush()
            if macro == "IP" and arguments:
                out.line.append(
                    ("- " if arguments[0] in ("•", "*", "o") else arguments[0] + ": ")
                    if len(arguments[0]) < 40
                    else arguments[0]
                )
            if macro == "It":
                out.line.append(_mdoc(arguments, name) + " ")
        elif macro in ("B", "I", "SM", "SB", "UR", "MT"):
            out.line.append(" ".join(arguments) + ("\n" if literal else " "))
        elif macro in ("BR", "IR", "RB", "RI", "BI", "IB"):
            out.line.append("".join(arguments) + ("\n" if literal else " "))
        elif macro == "Nd":
            out.line.append("- " + _mdoc(arguments, name))
        elif macro in CALLED or macro in QUOTES:
            out.line.append(_mdoc([macro, *arguments], name) + ("\n" if literal else " "))
    out.literal() if literal else out.flush()
    return out.text()


def from_pod(data: bytes) -> str:
    """Perl's plain old documentation."""
    out, until = Writer(), ""
    for block in re.split(r"\n[ \t]*\n", decode(data)):
        block = block.strip("\n")
        command, _, rest = block.partition(" ") if block.startswith("=") else ("", "", block)
        command = command.split("\n")[0]
        if until:
            until = "" if command == "=end" else until
        elif command == "=begin":
            until = "=end"
        elif command in ("=pod", "=cut", "=over", "=back", "=for", "=encoding", "=end"):
            continue
        elif block.startswith((" ", "\t")):
            out.line.append(block)
            out.literal()
        else:
            text = rest
            while (changed := POD.sub(_pod_code, text)) != text:
                text = changed
            out.line.append(text)
            out.bullet = command == "=item" and text.strip() not in ("*", "")
            out.flush() if text.strip() != "*" else out.line.clear()
    return out.text()


POD = re.compile(r"([A-Z])(?:<<+ (?P<wide>.*?) >>+|<(?P<text>[^<>]*)>)", re.DOTALL)


def _pod_code(match: re.Match[str]) -> str:
    text = match["wide"] if match["wide"] is not None else match["text"]
    if match[1] in "XZ":
        return ""
    if match[1] == "E":
        return {"lt": "‹", "gt": "›", "sol": "/", "verbar": "|"}.get(text, html.unescape(f"&{text};"))
    return text.split("|")[0] if match[1] == "L" else text


def from_info(data: bytes) -> str:
    """GNU info: all nodes in order, without their headers, menus and indices."""
    out = []
    for node in decode(data).split("\x1f")[1:]:
        head, _, text = node.strip("\n").partition("\n")
        if head.startswith("File:") and "Index" not in head:
            out.append(re.sub(r"\n\* Menu:\n.*?(?=\n\n[^*\s]|\Z)", "\n", text, flags=re.DOTALL))
    return from_text("\n\n".join(out).encode())
