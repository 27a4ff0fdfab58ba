"""How the tests of the pages read them, and texts that must stay text in them."""

import re
from html.parser import HTMLParser

ODD_TEXTS = [
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}{% for x in y %}",
    "</table></main>",
    '"onload="alert(1)',
    "&lt;b&gt;",
    "a\x1b[31mb\x00\x9b\u202ec\ud800\n",
]


class Page(HTMLParser):
    """The tags, attributes and visible text of a page; closing tags must match."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open_tags = [], [], [], []
        self.feed(html)
        assert not self.open_tags
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "use", "path", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in ("meta", "use", "path", "br"):
            assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_tags:
            self.texts.append(data)


def tiles(html):
    return dict(re.findall(r'class="label">([^<]*)</div><div class="value[^"]*">([^<]*)<', html))
