"""Registries of named choices (surrogates, models, defences, attacks, data sets, backends), open to other packages.

Built-in choices register themselves by name. Another installed package adds a choice through an entry point in the
group of its kind. The entry point has the name of the choice and refers to what a built-in choice would register:

    [project.entry-points."mpdsgr_deploy.models"]
    my-net = "my_package.nets:build"

To list names, only the metadata of installed packages is read. A plug-in is imported when its name is looked up.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.lookup import choose

T = TypeVar("T")


class Expected(NamedTuple):
    """What the entries of a registry must be: a test of an entry, and a phrase for the error message if it fails."""

    description: str
    accepts: Callable[[object], bool]


CALLABLE = Expected("a callable", callable)


class Registry(Mapping[str, T]):
    """Entries by name: built-in ones in the order of registration, then those of other packages in that of their names.

    kind: what error messages call an entry, such as "data set". group: the group of other packages' entry points.
    Looking up a name raises InputError for an entry point that cannot be loaded or is not what is expected.
    """

    def __init__(
        self, kind: str, group: str, built_in: Mapping[str, T] = MappingProxyType({}), *, expected: Expected = CALLABLE
    ) -> None:
        self.kind, self.group, self.expected = kind, group, expected
        self.loaded: dict[str, T] = dict(built_in)  # with the plug-ins that have been looked up
        self._plugins: dict[str, EntryPoint] | None = None  # None: not yet searched for

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make an entry available under `name`. Raises InputError if the name is taken."""

        def add(entry: T) -> T:
            self.add(name, entry)
            return entry

        return add

    def add(self, name: str, entry: T) -> None:
        """Make `entry` available under `name`. Raises InputError if the name is taken."""
        if name in self.loaded:
            raise InputError(f"{self.kind} {name!r} is registered twice; rename one of them")
        self.loaded[name] = entry

    def choose(self, name: str) -> T:
        """Return the entry of that name. Raises InputError, which lists the known names, if there is none."""
        return choose(self.kind, self, name)

    def __getitem__(self, name: str) -> T:
        plugins = self._find_plugins()  # also for a built-in name, so that a duplicate is always noticed
        if name not in self.loaded:
            self.loaded[name] = self._load(plugins[name])
        return self.loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.loaded or name in self._find_plugins()

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self.loaded), **dict.fromkeys(self._find_plugins())})

    def __len__(self) -> int:
        return len(self.loaded.keys() | self._find_plugins().keys())

    def _find_plugins(self) -> dict[str, EntryPoint]:
        """Return the entry points of this group by name. Raises InputError if a name occurs twice."""
        if self._plugins is None:
            plugins: dict[str, EntryPoint] = {}
            for point in sorted(_installed(self.group), key=lambda point: point.name):
                if point.name in self.loaded or point.name in plugins:
                    other = distribution(plugins[point.name]) if point.name in plugins else "mpdsgr-deploy"
                    raise InputError(
                        f"{self.kind} {point.name!r} is provided by {other} and by {distribution(point)}; "
                        "uninstall one of them or rename its entry point"
                    )
                plugins[point.name] = point
            self._plugins = plugins
        return self._plugins

    def _load(self, point: EntryPoint) -> T:
        source = f"{self.kind} {point.name!r} of the installed package {distribution(point)}"
        try:
            entry = point.load()
        except Exception as error:  # code of another package may raise any type
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(f"{source} cannot be loaded ({reason}); repair or uninstall that package") from error
        if not self.expected.accepts(entry):
            raise InputError(f"{source} is not {self.expected.description}; repair or uninstall that package")
        loaded: T = entry
        return loaded


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def distribution(point: EntryPoint) -> str:
    """Return the name and version of the package that declares an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
