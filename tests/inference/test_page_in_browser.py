"""The page in a real browser against the real function: by mouse, by keyboard alone, on a phone, in the dark; and how fast."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from browser import Watched, chromium, needs_chromium, opened
from conftest import replace_database
from served_world import ServedWorld, build
from test_asgi_door import served
from worlds import key_header

from inference.handlers.asgi import create_app
from inference.links import Links

pytestmark = needs_chromium

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
SECRET = "a:" + "s" * 40
FCP_MS = 1_000
ROW = "#list > .item:not(.skeleton)"


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE paged TEMPLATE {template}")
    yield build(replace_database(postgres_url, "paged"), tmp_path_factory.mktemp("paged"), people=12, items=120)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE paged WITH (FORCE)")


@pytest.fixture(scope="module")
def key(world: ServedWorld) -> str:
    return key_header(world.url, per_minute=100_000)["authorization"].removeprefix("Bearer ")


@pytest.fixture(scope="module")
def port(world: ServedWorld) -> Iterator[int]:
    def application() -> Any:
        return world.application(survey_per_mille=1_000, link_keys=SECRET)

    with served(create_app(application)) as number:
        yield number


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def base(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def room(browser: Any, base: str, key: str, user: str, **how: Any) -> Any:
    """The page, opened with a key and a person in its address."""
    return opened(browser, base, f"#key={key}&person={user}", **how)


def items(watched: Watched) -> list[str]:
    watched.page.wait_for_selector(ROW)
    watched.page.wait_for_selector("#list[aria-busy=false]")
    return [row.get_attribute("data-item") for row in watched.page.query_selector_all(ROW)]


def until(page: Any, condition: str) -> None:
    """Wait until `condition` holds in the page. Playwright's own way evaluates text inside it, which its policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def events(world: ServedWorld, user: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(world.url) as connection:
        return connection.execute(
            "SELECT item_id, kind, value, request_id FROM recent_events WHERE user_id = %s AND event_id LIKE 'page-%%' "
            "ORDER BY known_at, event_id",
            (user,),
        ).fetchall()


# --- in, and what is shown ------------------------------------------------------------------------------------------


def test_from_key_to_list(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    with opened(browser, base) as watched:
        page = watched.page
        page.fill("#key", "nonsense")
        page.click("#key-form button")
        assert "neither a key" in page.inner_text("#key-fault")
        page.fill("#key", key)
        page.click("#key-form button")
        page.wait_for_selector("#people-list button")
        assert set(page.locator("#people-list button").all_inner_texts()) <= set(world.people)
        page.click("#people-list button >> nth=0")
        assert len(items(watched)) == 10
        assert page.locator(".because").all_inner_texts().count("") == 0, "every item says why"
        page.wait_for_selector("#history time")
        page.click("#made summary")
        told = page.inner_text("#made")
        assert world.version in told
        assert "candidates" in told
        assert "none" in page.inner_text("#made-facts dt:text('Experiment') + dd")
        watched.clean()


def test_a_key_in_the_address_leaves_it_at_once_and_dies_with_the_tab(
    browser: Any, base: str, key: str, world: ServedWorld
) -> None:
    with room(browser, base, key, world.people[0]) as watched:
        items(watched)
        assert watched.page.url == base
        assert watched.page.evaluate("history.length") <= 2
        assert key in watched.page.evaluate("sessionStorage.getItem('larder.session')")
        assert watched.page.evaluate("localStorage.length + document.cookie.length") == 0
        assert key not in watched.page.content()
        watched.page.reload()
        watched.page.wait_for_selector("#gate-person:not([hidden])")
        watched.page.click("#lock")
        watched.page.wait_for_selector("#gate-key:not([hidden])")
        assert watched.page.evaluate("sessionStorage.length") == 0
        watched.clean()


def test_a_key_that_does_not_list_people_still_opens_the_page(browser: Any, base: str, world: ServedWorld) -> None:
    small = key_header(world.url, ["recommend", "write"])["authorization"].removeprefix("Bearer ")
    with opened(browser, base, f"#key={small}") as watched:
        watched.page.fill("#person", world.people[1])
        watched.page.keyboard.press("Enter")
        assert len(items(watched)) == 10
        assert not watched.page.is_visible("#people")
        watched.clean()


def test_a_personal_link_opens_what_it_is_for_and_no_more(browser: Any, base: str, world: ServedWorld) -> None:
    user = world.people[2]
    token = Links.read(SECRET).make(user, "export", 1)
    with opened(browser, base) as watched:
        watched.page.fill("#key", f"/people/{user}/export?token={token}")
        watched.page.keyboard.press("Enter")
        watched.page.wait_for_selector("#history time")
        assert watched.page.is_visible("#export")
        for other in ("#forget", "#consent", "#list"):
            assert not watched.page.is_visible(other), other
        watched.clean()


# --- steering and judging -------------------------------------------------------------------------------------------


def test_a_wish_and_more_variety_change_the_list(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    with room(browser, base, key, world.people[3]) as watched:
        page = watched.page
        before = items(watched)
        page.fill("#wish", "a mystery with a detective")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#list-title').textContent.startsWith('For ')")
        wished = items(watched)
        assert wished != before
        assert page.inner_text("#list-title") == "For “a mystery with a detective”"
        assert "wish" in page.inner_text("#made-facts dt:text('Reads wishes by') + dd") or not page.is_visible(
            "#made-facts"
        )
        page.focus("#diversity")
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        until(page, "document.querySelector('#diversity-says').textContent === 'as wide as can be'")
        with page.expect_response("**/recommendations") as answered:
            pass
        assert answered.value.request.post_data_json["diversity"] == 1
        assert items(watched) != wished
        watched.clean()


def test_thumbs_and_hide_show_at_once_can_be_undone_and_are_posted(
    browser: Any, base: str, key: str, world: ServedWorld
) -> None:
    user = world.people[4]
    with room(browser, base, key, user) as watched:
        page = watched.page
        liked, disliked, hidden, spared = items(watched)[:4]
        request_id = page.text_content("#made-facts dt:text('Request') + dd")
        page.click(f"[data-item={liked}] .up")
        page.click(f"[data-item={disliked}] .down")
        page.click(f"[data-item={hidden}] .hide")
        page.click(f"[data-item={spared}] .hide")
        assert page.get_attribute(f"[data-item={liked}] .up", "aria-pressed") == "true"
        assert "Hidden" in page.inner_text(f"[data-item={hidden}]")
        page.click(f"[data-item={spared}] button:text('Undo')")
        assert "Hidden" not in page.inner_text(f"[data-item={spared}]")
        assert events(world, user) == [], "it can still be taken back"
        with page.expect_response("**/events"), page.expect_response("**/recommendations"):
            pass  # after the seconds in which it can be undone
        until(page, f"!document.querySelector('[data-item={liked}]')")
        after = items(watched)
        assert not {liked, disliked, hidden} & set(after)
        # How high what was taken back stands now is the ranker's to say: of all that the person can be given, it is there.
        everything = page.request.post(
            f"{base}recommendations", headers={"authorization": f"Bearer {key}"}, data={"user_id": user, "k": 100}
        ).json()["items"]
        assert {spared, liked, disliked, hidden} & {one["item_id"] for one in everything} == {spared}
        assert sorted(events(world, user)) == sorted(
            [
                (liked, "rating", 5.0, request_id),
                (disliked, "hide", 1.0, request_id),
                (hidden, "hide", None, request_id),
            ]
        )
        until(page, "document.querySelectorAll('#history .fresh').length === 3")
        assert "Not for me" in page.inner_text("#history")
        watched.clean()


def test_what_waits_is_posted_before_the_next_list_and_when_the_page_goes(
    browser: Any, base: str, key: str, world: ServedWorld
) -> None:
    user = world.people[5]
    with room(browser, base, key, user) as watched:
        first, *_ = items(watched)
        watched.page.click(f"[data-item={first}] .up")
        watched.page.fill("#wish", "something quiet")
        watched.page.keyboard.press("Enter")
        until(watched.page, "document.querySelector('#list-title').textContent.startsWith('For ')")
        assert [event[0] for event in events(world, user)] == [first]
        other = next(item for item in items(watched) if item != first)
        watched.page.click(f"[data-item={other}] .down")
        watched.page.goto("about:blank")
        end = time.monotonic() + 10
        while len(events(world, user)) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [event[:2] for event in events(world, user)] == [(first, "rating"), (other, "hide")]


def test_opening_an_item_is_a_click_and_staying_a_view(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    user = world.people[6]
    with opened(browser, base) as watched:
        page = watched.page
        page.clock.install()
        page.reload()
        page.evaluate(f"location.hash = 'key={key}&person={user}'")
        item, other = items(watched)[:2]
        page.click(f"[data-item={item}] .why")
        assert page.is_visible(f"[data-item={item}] .reasons")
        assert events(world, user) == [], "asking why is no sign of liking"
        page.click(f"[data-item={item}] .title")
        page.wait_for_selector(f"[data-item={item}] .alike span")
        page.clock.fast_forward(11_000)
        with page.expect_response("**/events"):
            page.click(f"[data-item={other}] .title")
        page.wait_for_selector(f"[data-item={other}] .alike span")
        page.click(f"[data-item={other}] .title")
        end = time.monotonic() + 10
        while len(events(world, user)) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert {event[:3] for event in events(world, user)} == {
            (item, "click", None),
            (item, "view", None),
            (other, "click", None),
        }, "a short look is no view"
        watched.clean()


def test_two_questions_are_asked_once_and_kept(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    user = world.people[8]
    with room(browser, base, key, user) as watched:
        page = watched.page
        page.wait_for_selector("#survey:not([hidden])")
        page.check("#survey [name=satisfied][value='4']", force=True)
        page.check("#survey [name=trust][value='2']", force=True)
        page.click("#survey button[type=submit]")
        page.wait_for_selector("#survey", state="hidden")
        request_id = page.text_content("#made-facts dt:text('Request') + dd")
        watched.clean()
    with psycopg.connect(world.url) as connection:
        kept = connection.execute(
            "SELECT request_id, question, answer FROM survey_answers WHERE user_id = %s ORDER BY question", (user,)
        ).fetchall()
    assert kept == [(request_id, "satisfied", 4), (request_id, "trust", 2)]
    with room(browser, base, key, user) as watched:
        items(watched)
        watched.page.wait_for_load_state("networkidle")
        assert not watched.page.is_visible("#survey")


def test_a_forgotten_person_is_gone_from_the_page(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    with room(browser, base, key, world.people[9]) as watched:
        page = watched.page
        page.wait_for_selector("#history time")
        page.click("#forget")
        page.click("#forget-dialog button[value=no]")
        assert page.locator("#history time").count() > 0
        page.click("#forget")
        page.click("#forget-dialog button[value=yes]")
        until(page, "document.querySelectorAll('#history time').length === 0")
        assert "hidden from now on" in page.inner_text("#data-says")
        watched.clean()


def test_what_is_degraded_is_said_in_plain_words(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    with room(browser, base, key, world.people[10]) as watched:
        page = watched.page
        items(watched)

        def worse(route: Any) -> None:
            answer = route.fetch()
            route.fulfill(
                response=answer,
                json=answer.json() | {"degraded": ["wish", "database"], "experiment": {"name": "e1", "arm": "b"}},
            )

        page.route("**/recommendations", worse)
        page.fill("#wish", "anything")
        page.keyboard.press("Enter")
        page.wait_for_selector("#degraded:not([hidden])")
        said = page.inner_text("#degraded")
        assert "Your wish could not be understood" in said
        assert "out of reach" in said
        assert "e1, arm “b”" in page.text_content("#made-facts")
        page.unroute("**/recommendations")
        page.route("**/recommendations", lambda route: route.abort())
        page.keyboard.press("Enter")
        page.wait_for_selector("#empty button")
        assert "cannot be reached" in page.inner_text("#empty")
        page.unroute("**/recommendations")
        page.click("#empty button")
        assert len(items(watched)) == 10


def test_counterfactual_reasons_are_shown_with_their_effect(
    browser: Any, base: str, key: str, world: ServedWorld
) -> None:
    because = [
        {"kind": "event", "title": "The Last Portrait", "effect": 0.8, "people_both": 3},
        {"kind": "wish", "words": "quiet", "effect": -0.2},
        {"kind": "new"},
    ]
    with opened(browser, base) as watched:

        def explained(route: Any) -> None:
            answer = route.fetch()
            body = answer.json()
            route.fulfill(
                response=answer, json=body | {"items": [item | {"because": because} for item in body["items"]]}
            )

        watched.page.route("**/recommendations", explained)
        watched.page.evaluate(f"location.hash = 'key={key}&person={world.people[10]}'")
        first = items(watched)[0]
        assert (
            watched.page.inner_text(f"[data-item={first}] .because")
            == "You had “The Last Portrait” — 3 people had both"
        )
        watched.page.click(f"[data-item={first}] .why")
        labels = [
            bar.get_attribute("aria-label") for bar in watched.page.query_selector_all(f"[data-item={first}] .effect")
        ]
        assert labels == ["speaks for it, 0.80", "speaks against it, 0.20"]
        watched.clean()


# --- for everybody --------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_is_enough(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    """From the key to a like, a hide and its undo, without a pointer; the focus is always seen, and never lost."""
    user = world.people[11]
    with opened(browser, base) as watched:
        page = watched.page
        page.wait_for_selector("#key:focus")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#person:focus")
        page.keyboard.type(user)
        page.keyboard.press("Enter")
        items(watched)

        def focus() -> str:
            return page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent || document.activeElement.id"
            )

        def tab_to(what: str, most: int = 25) -> None:
            for _ in range(most):
                page.keyboard.press("Tab")
                seen = page.evaluate(
                    "(() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 })()"
                )
                assert seen, f"{focus()!r} has the focus and does not show it"
                if focus().startswith(what):
                    return
            raise AssertionError(f"{what} is not reached by Tab")

        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "wish"
        page.keyboard.type("a story about the sea")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#list-title').textContent.startsWith('For ')")
        items(watched)
        tab_to("Why this?")
        page.keyboard.press("Enter")
        assert page.is_visible(f"{ROW}:first-child .reasons")
        assert focus().startswith("Why this?"), "drawing the list again leaves the focus where it was"
        tab_to("I like this")
        page.keyboard.press("Space")
        assert page.get_attribute(f"{ROW}:first-child .up", "aria-pressed") == "true"
        page.keyboard.press("Space")
        assert page.get_attribute(f"{ROW}:first-child .up", "aria-pressed") == "false"
        tab_to("Hide this")
        page.keyboard.press("Enter")
        assert focus().startswith("Undo")
        until(page, "document.querySelector('#live').textContent.startsWith('Hidden: ')")
        page.keyboard.press("Enter")
        assert focus().startswith("Hide this")
        tab_to("Forget me", 80)
        page.keyboard.press("Enter")
        page.wait_for_selector("#forget-dialog[open]")
        assert focus() == "Keep everything", "the safe way out has the focus"
        page.keyboard.press("Escape")
        page.wait_for_selector("#forget-dialog", state="hidden")
        assert focus().startswith("Forget me")
        assert events(world, user) == []
        watched.clean()


def _unnamed(page: Any) -> list[str]:
    """Controls and pictures of the accessibility tree without a name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "link",
        "textbox",
        "searchbox",
        "slider",
        "radio",
        "checkbox",
        "image",
        "dialog",
        "search",
        "list",
        "region",
    }
    found = [node for node in nodes if not node.get("ignored") and node.get("role", {}).get("value") in roles]
    assert len(found) > 2
    # A plain list needs no name; one that stands for something has one.
    return [
        str(node["role"]["value"])
        for node in found
        if not node.get("name", {}).get("value", "").strip() and node["role"]["value"] != "list"
    ]


_CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const lit = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0.99) return c; } return [255, 255, 255]; };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({ opacityProperty: true }) || node.closest(".sr, .skip, noscript")) continue;
    const [a, b] = [lit(parse(getComputedStyle(node).color)), lit(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${node.className || node.id || node.tagName}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read_on_a_phone(
    browser: Any, base: str, key: str, world: ServedWorld, scheme: str
) -> None:
    with opened(browser, base, color_scheme=scheme, reduced_motion="reduce", **PHONE) as watched:
        page = watched.page
        page.wait_for_selector("#key:focus")
        assert (_unnamed(page), page.evaluate(_CONTRAST)) == ([], [])
        page.evaluate(f"location.hash = 'key={key}&person={world.people[10]}'")
        items(watched)
        page.wait_for_selector("#survey:not([hidden])")
        page.click(f"{ROW}:first-child .title")
        page.wait_for_selector(".alike span")
        page.click(f"{ROW}:nth-child(2) .up")
        page.click(f"{ROW}:nth-child(3) .hide")
        page.click("#made summary")
        assert (_unnamed(page), page.evaluate(_CONTRAST)) == ([], [])
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        small = page.evaluate(
            "[...document.querySelectorAll('button, input, summary')].filter((one) => one.checkVisibility() && !one.matches('.title, [type=range], [type=radio]'))"
            ".map((one) => [one.textContent.trim() || one.id, one.getBoundingClientRect()]).filter(([, box]) => box.height < 40 || box.width < 40).map(([name]) => name)"
        )
        assert small == [], "too small for a thumb"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(dark.strip("rgb()").split(",")[0]) < 60) == (scheme == "dark")
        assert page.evaluate("document.getAnimations().length") == 0, "who asked for less motion gets none"
        watched.clean()


def test_it_is_there_within_a_second(browser: Any, base: str, key: str, world: ServedWorld) -> None:
    with room(browser, base, key, world.people[0]) as watched:
        items(watched)
        first = watched.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert 0 < first < FCP_MS
        watched.clean()
