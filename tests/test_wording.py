"No value passes for markup: what other people's renderers make of a message is its plain text, and bold where ours is"
import re
from html.parser import HTMLParser

import markdown
import pytest
from apprise import NotifyFormat
from apprise.conversion import convert_between
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tradelab.config import AlertSettings
from tradelab.database.records import Alert
from tradelab.errors import ConfigurationError
from tradelab.notices import NOTICES
from tradelab.ops.happenings import HAPPENINGS
from tradelab.ops.incidents import Escalate, message_of, rules_of
from tradelab.ops.wording import DIALECTS, PHRASES, WORDING, example_of, plain, templates_of, worded

EVIL = st.text(st.sampled_from("ab1 .\n\t*_`~[](){}<>#+-=|!\\&;:/@'\"ñ¿\u00a0\x1b"), max_size=40) | st.text(max_size=30)
SPECIAL = "_*[]()~`>#+-=|{}.!"


class Seen(HTMLParser):
    "Text and tags of a page"

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.links = "", set(), []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += attributes

    def handle_data(self, data): self.text += data


def squeezed(text): return " ".join(text.split())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(("halt", "condition", "position closed", "breaker open")), EVIL, st.sampled_from(("en", "es")))
@example("condition", "", "en")
@example("halt", "![x](http://evil) <img src=x onerror=y> **b** &amp; &lt;", "es")
def test_renderers_show_the_plain_text(kind, value, language):
    values = {key: value if isinstance(each, str) else each for key, each in example_of(kind).items()}
    text, expected = (worded(kind, values, language, dialect=dialect) for dialect in ("markdown", "plain"))
    for page in (MarkdownIt("commonmark").render(text), markdown.markdown(text)):
        seen = Seen(page)
        assert squeezed(seen.text) == squeezed(expected)
        assert seen.tags == {"p", "strong"}
    seen = Seen(worded(kind, values, language, dialect="html"))
    assert (squeezed(seen.text), seen.tags) == (squeezed(expected), {"b"})


@settings(max_examples=150, deadline=None)
@given(EVIL)
def test_telegram_takes_what_is_escaped(value):
    "Its Bot API refuses a message with an open mark, or a special sign that is not escaped"
    text = worded("halt", {"text": value}, "es", dialect="telegram")
    bare = re.sub(r"\\[\x01-\x7e]", "", text)
    assert bare.count("*") == 2
    assert not set(SPECIAL) - {"*"} & set(bare)
    shown = re.sub(r"\\([\x01-\x7e])", r"\1", re.sub(r"(?<!\\)\*(?=Operativa|:)", "", text))
    assert squeezed(shown) == squeezed(plain("halt", {"text": value}, "es"))


@pytest.mark.parametrize("language", ("en", "es"))
@pytest.mark.parametrize("kind", sorted(WORDING))
def test_every_kind_has_words_with_all_its_values(kind, language):
    text = plain(kind, example_of(kind), language)
    assert text and "?" not in text and "{" not in text and "  " not in text
    if language == "es" and "203.0.113.7" not in text and kind != "resource": assert not re.search(r"\d\.\d", text)


def test_the_tables_are_one():
    assert WORDING.keys() == HAPPENINGS.keys() >= NOTICES.keys()
    assert all(each.keys() == {"en", "es"} and each["en"] != each["es"] or kind.startswith("condition")
               for kind, each in (*WORDING.items(), *PHRASES.items()))


def test_spanish_has_its_accents_and_both_question_marks():
    texts = [each["es"] for table in (WORDING, PHRASES) for each in table.values()]
    for text in texts:
        assert text.count("?") == text.count("¿")
        assert not re.search(r"(?i)cion\b|\b(sesion|posicion|credito|limite|estan|todavia|tambien|exito)\b", text), text


def test_a_message_of_several_lines_is_several_paragraphs():
    alert = Alert(7, 60_000, "halt", "critical", "s", arguments='{"text": "-20 %"}', count=3, last_time=60_000)
    page = MarkdownIt("commonmark").render(message_of(Escalate(alert), 1_260_000, "es"))
    assert page.count("<p>") == 3
    assert "¿Lo está mirando alguien? tradelab alerts ack 7" in page
    sent = convert_between(NotifyFormat.MARKDOWN, NotifyFormat.TEXT, message_of(Escalate(alert), 1_260_000, "es"))
    assert "Operativa detenida: -20 %" in squeezed(sent.replace("*", ""))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("{}!:.,*[]ax_ text0%f"), max_size=20))
def test_a_template_is_refused_or_words_everything(template):
    try: own = templates_of({"halt": template})
    except ConfigurationError as error:
        assert "\n" not in str(error)
        return
    for dialect in DIALECTS: assert worded("halt", {}, "es", own["halt"], dialect) is not None


def test_settings_that_are_none_are_one_sentence():
    with pytest.raises(ConfigurationError, match="alerts.levels names 'hlat', which is no kind of notice"):
        rules_of(AlertSettings(levels={"hlat": "error"}))
