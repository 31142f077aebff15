"""Who may use a service: objects that decide about a name.

Over TLS the name is the distinguished name of the client's certificate, see
:func:`qmpd.qom.tls_creds.distinguished_name`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Final

from qmpd.qom.user_creatable import UserCreatable

_WILD: Final[Mapping[str, str]] = {"*": ".*", "?": "."}


class Authorization(UserCreatable):
    """What objects that decide have in common."""

    @abstractmethod
    def allows(self, identity: str) -> bool:
        """Whether the one with this name is let in."""


class AuthorizationList(Authorization):
    """The object type "authz-list": the first rule that is about somebody decides."""

    qom_type = "authz-list"
    struct = "AuthZListProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._policy: str = options.get("policy", "deny")
        self._rules: list[dict[str, str]] = options.get("rules", [])

    def allows(self, identity: str) -> bool:
        """Whether the first rule about this name, or else the policy, lets it in."""
        found = next((rule["policy"] for rule in self._rules if _is_about(rule, identity)), self._policy)
        return found == "allow"

    def get(self, name: str) -> Any:
        """The policy or the rules."""
        return self._policy if name == "policy" else self._rules

    def set(self, name: str, value: Any) -> None:
        """Change the policy, or all rules at once."""
        setattr(self, f"_{name}", value)


class SimpleAuthorization(Authorization):
    """The object type "authz-simple": one name is let in."""

    qom_type = "authz-simple"
    struct = "AuthZSimpleProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._identity: str = options["identity"]

    def allows(self, identity: str) -> bool:
        """Whether it is the one."""
        return identity == self._identity

    def get(self, name: str) -> Any:
        """The name."""
        return self._identity

    def set(self, name: str, value: Any) -> None:
        """Let another one in."""
        self._identity = value


def _is_about(rule: Mapping[str, str], identity: str) -> bool:
    if rule.get("format", "exact") == "exact":
        return rule["match"] == identity
    pattern = "".join(_WILD.get(character, re.escape(character)) for character in rule["match"])
    return re.fullmatch(pattern, identity, re.DOTALL) is not None
