"""examples/english: pages, manuals and books to text."""

from __future__ import annotations

import zlib

import books
import manuals
import pages


def test_html_to_text() -> None:
    page = (
        b"""<!DOCTYPE html><html><head><title>no</title><style>p > b {}</style></head><body>
      <div class="sphinxsidebar"><ul><li>no</li></ul></div>
      <div class="body" role="main"><h1>The light<a class="headerlink" href="#x">&para;</a></h1>
      <!-- no --><p>A <em>ship</em>&nbsp;came
        by, <code>1 &lt; 2</code>.<p>Old pages leave these open.<br>Line.
      <ul><li>one</li><li><p>two</p></li></ul>
      <pre>if x:\n    y  <b>=</b> 1\n</pre><script>if (a < b) { no }</script>
      <table><tr><th>a</th><td>b</td></tr></table>"""
        + b"<p>"
        + b"Enough to be the main part. " * 9
        + b"""</p></div>
      <div class="footer">no</div></body></html>"""
    )
    text = pages.from_html(page)
    assert text.startswith(
        "The light\n\nA ship came by, 1 < 2.\n\nOld pages leave these open. Line.\n\n- one\n- two\n\n"
        "if x:\n    y  = 1\n\na | b\n\nEnough"
    )
    assert "no" not in text.split()


def test_docbook_and_mallard_to_text() -> None:
    page = (
        b'<page xmlns="x"><info><desc>no</desc></info><title>Files</title>'
        b"<p>Press <gui>Open</gui> in the <app>viewer</app>.</p>"
        b"<list><item><p>one</p></item></list><para>See <![CDATA[a<b]]>.</para></page>"
    )
    assert pages.from_html(page) == "Files\n\nPress Open in the viewer.\n\n- one\n\nSee a<b."


def test_man_pages_to_text() -> None:
    man = rb""".\" no
.TH LIGHT 7 "2020" "no"
.SH NAME
light \- a \fIlamp\fP for
.BR ships (1)
.TP
.B \-\-on
Lit \(em always.
.nf
a
  b
.fi
"""
    assert manuals.from_man(man) == "LIGHT(7)\n\nNAME\n\nlight - a lamp for ships(1)\n\n--on Lit — always.\n\na\n  b"
    mdoc = b""".Dd May 1
.Dt LAMP 4
.Sh NAME
.Nm lamp
.Nd a light
.Sh DESCRIPTION
The
.Nm
driver, see
.Xr ship 1 ,
takes
.Fl v
and says
.Dq lit .
"""
    assert manuals.from_man(mdoc) == (
        "LAMP(4)\n\nNAME\n\nlamp - a light\n\nDESCRIPTION\n\nThe lamp driver, see ship(1), takes -v and says “lit”."
    )


def test_pod_info_and_text() -> None:
    assert manuals.from_pod(
        b"=head1 The B<light>\n\nSee L<the page|perlop> and C<< a > b >>.X<no>\n\n"
        b"=over\n\n=item one\n\n=back\n\n    code\n\n=cut"
    ) == ("The light\n\nSee the page and a > b.\n\n- one\n\n    code")
    info = (
        b"head\n\x1f\nFile: a.info,  Node: Top\n\nHello there.\n\n* Menu:\n\n* One::  no\n\n"
        b"\x1f\nFile: a.info,  Node: One\n\n1 One\n*****\n\nText.\n"
    )
    assert manuals.from_info(info) == "Hello there.\n\n1 One\n*****\n\nText."
    assert pages.from_text("b\x08bold \xe9\n\n\n\nend\f\n".encode("latin-1")) == "bold é\n\nend"


def test_books_of_the_other_formats() -> None:
    block = zlib.compress(b"<p>In the <w>be</w><w>ginning</w><lb/>there was</p>")
    assert books.from_sword(block + b"gap" + zlib.compress(b"Light.")) == "In the beginning\n\nthere was\fLight."
    strings = b"".join(b"\0\x04\0\x09" + len(one).to_bytes(4, "big") + one for one in (b"EMMA", b"", b"CHAPTER I"))
    assert books.from_rdb(len(strings).to_bytes(4, "big") + zlib.compress(strings)) == "EMMA\n\nCHAPTER I"
    assert books.from_wml(b'[message]\nspeaker=Nym\nmessage= _ "Look, ""there""!"\n[/message]') == 'Nym: Look, "there"!'
