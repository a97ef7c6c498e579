"""Key files for tests."""

from pathlib import Path

from coordinator.tenants.keys import digest_of, new_key

SECRET = 'secret = "0123456789abcdef0123456789abcdef"\n'


def entry(tenant: str, key: str, more: str = "") -> str:
    return f'[[keys]]\ntenant = "{tenant}"\nhash = "sha256:{digest_of(key).hex()}"\n{more}\n'


class KeyFile:
    """A file of tenants with one key each, which a test may write again."""

    def __init__(self, path: Path, **tenants: str) -> None:
        """`tenants`: lines of each one's table."""
        self.path = path
        self.keys = {name: new_key() for name in tenants}
        self.tenants = tenants
        self.write()

    def write(self) -> None:
        tables = "".join(f"[tenants.{name}]\n{lines}\n" for name, lines in self.tenants.items())
        self.write_text(SECRET + tables + "".join(entry(name, self.keys[name]) for name in self.keys))

    def write_text(self, text: str) -> None:
        """All at once, as an editor does."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        new.replace(self.path)

    def headers(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def metadata(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.keys[tenant]}"),)
