from __future__ import annotations

import pytest

from qmpd.errors import Error
from qmpd.qom.authz import AuthorizationList, SimpleAuthorization
from qmpd.qom.tree import ObjectTree


def test_one_name_is_let_in() -> None:
    one = SimpleAuthorization({"identity": "CN=a"})
    assert one.allows("CN=a")
    assert not one.allows("CN=ab")
    one.set("identity", "CN=ab")
    assert one.allows("CN=ab")


@pytest.mark.parametrize(
    ("match", "identity", "is_about"),
    [
        ("O=qmpd,CN=*", "O=qmpd,CN=client", True),
        ("O=?mpd*", "O=qmpd,CN=client", True),
        ("*", "", True),
        ("?", "", False),
        ("O=qmpd", "O=qmpd,CN=client", False),
        ("o=qmpd*", "O=qmpd,CN=client", False),
        # Only * and ? are wild, as in GLib's patterns.
        ("O=[q]mpd*", "O=qmpd,CN=client", False),
        ("O=[q]mpd*", "O=[q]mpd,CN=client", True),
        ("a*c", "a\nc", True),
    ],
)
def test_a_pattern_is_about_a_whole_name(match: str, identity: str, is_about: bool) -> None:
    rules = [{"match": match, "policy": "allow", "format": "glob"}]
    assert AuthorizationList({"rules": rules}).allows(identity) is is_about


def test_the_first_rule_about_somebody_decides_and_else_the_policy() -> None:
    rules = [
        {"match": "CN=bad", "policy": "deny"},
        {"match": "CN=*", "policy": "allow", "format": "glob"},
        {"match": "CN=*", "policy": "deny", "format": "glob"},
    ]
    some = AuthorizationList({"rules": rules})
    assert [some.allows(name) for name in ("CN=bad", "CN=good", "CN=*", "O=x")] == [False, True, True, False]
    some.set("policy", "allow")
    assert some.allows("O=x")
    assert not AuthorizationList({}).allows("CN=good")


async def test_rules_can_be_read_and_changed_and_are_checked(tree: ObjectTree) -> None:
    rules = [{"match": "x", "policy": "allow", "format": "glob"}, {"match": "y", "policy": "deny"}]
    await tree.add({"qom-type": "authz-list", "id": "a", "rules": rules})
    assert tree.get("a", "rules") == rules
    assert tree.get("a", "policy") == "deny"
    assert tree.properties("a")[1:] == [
        {"name": "policy", "type": "QAuthZListPolicy"},
        {"name": "rules", "type": "QAuthZListRule"},
    ]
    with pytest.raises(Error, match=r"^Parameter 'rules\[0\]\.policy' is missing$"):
        tree.set("a", "rules", [{"match": "z"}])
    assert tree.get("a", "rules") == rules
    tree.set("a", "rules", [])
    assert tree.get("a", "rules") == []
