"""The layout as a test: who may import whom, and where each outside library lives.

Every import counts, those inside functions too. Generated code is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    "errors stopping keys pixels transfers phases bare_calls bench_report",
    "yaml_tree key_types sections extends schema json_schema framing",
    "processes regions gaussian noise masks scores policy_gradient advantages preference ranks combiners "
    "fidelity brushnet_protocol statistics workload",
    "images holes",
    "values outline denoising sampling samplers tracing costs switches",
    "data scan outputs cache datasets rows",
    "rewards machines distributed adapters models embedded_server plots tracking",
    "reward_traffic reward_channel reward_failover reward_routes reward_wire reward_lane",
    "reward_client reward_connection",
    "resharding tensor_file checkpoint_files stored_checkpoint checkpoint_writer",
    "optimizer zero_config shards slots checkpoints sharded_load engine",
    "rollout heldout results alarms collapse algorithm pictures comparison measure report_text report_page report",
    "algorithms",
    "recipe recipe_schema recipe_diff run_folder model_card commands export policies",
    "gpus engine_memory memory duration plan remedies check_text",
    "meter trainer bench_rounds",
    "photos run check bench prepare sample evaluate launcher",
)
"""Files and folders of ds_inpaint, bottom first. Each imports only what stands below it or left of it."""

HOMES = {
    "deepspeed": [
        "ds_inpaint.zero_config",
        "ds_inpaint.shards",
        "ds_inpaint.checkpoints",
        "ds_inpaint.sharded_load",
        "ds_inpaint.engine",
        "ds_inpaint.launcher",
    ],
    "psutil": ["ds_inpaint.launcher", "ds_inpaint.machines", "ds_inpaint.stopping"],
    "torch.distributed": ["ds_inpaint.distributed"],
    "diffusers": ["ds_inpaint.models"],
    "transformers": ["ds_inpaint.models", "reward_servers"],
    "huggingface_hub": ["ds_inpaint.models", "reward_servers.weights"],
    "peft": ["ds_inpaint.adapters"],
    "yaml": ["ds_inpaint.yaml_tree", "reward_servers.config"],
    "PIL": ["ds_inpaint.images", "reward_servers.openai_client"],
    "matplotlib": ["ds_inpaint.plots"],
    "wandb": ["ds_inpaint.tracking"],
    "tqdm": ["ds_inpaint.tracking"],
    "skimage": ["ds_inpaint.photos"],
    "grpc": ["ds_inpaint.reward_channel", "reward_servers"],
    "grpc_health": ["ds_inpaint.reward_channel", "reward_servers"],
    "grpc_reflection": ["reward_servers"],
    "prometheus_client": ["reward_servers"],
    "ds_inpaint_protos": [
        *("ds_inpaint.reward_channel", "ds_inpaint.reward_routes", "ds_inpaint.reward_wire"),
        *("ds_inpaint.reward_lane", "ds_inpaint.reward_client", "reward_servers"),
    ],
}
"""The only places that may import each outside library; a folder stands for all that is in it."""

FOLDERS = {"ds_inpaint": "ds_inpaint", "reward_servers": "reward_servers", "ds_inpaint_protos": "protos"}
"""The packages and their folders. Neither of the first two imports the other; the third imports none."""


def is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def read_imports(root: Path) -> dict[str, set[str]]:
    """Each module of the packages, and the dotted names that it imports."""
    imports = {}
    for package, folder in FOLDERS.items():
        for path in (root / folder).rglob("*.py"):
            if "_pb2" in path.name:
                continue
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            here = parts[:-1]  # the folder that relative imports start from
            module = ".".join(here if parts[-1] == "__init__" else parts)
            imports[module] = set(imported_names(ast.parse(path.read_text()), here))
    return imports


def imported_names(tree: ast.AST, here: list[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"  # it can be used with no import of its own


def floor_of(module: str) -> int | None:
    """Position in FLOORS, read from bottom to top and left to right; the package itself is below all."""
    if module == "ds_inpaint":
        return -1
    order = " ".join(FLOORS).split()
    name = module.split(".")[1]
    return order.index(name) if name in order else None


def violations(root: Path) -> list[str]:
    """A sentence for every import that the layout does not allow."""
    imports = read_imports(root)
    arrows = {module: set() for module in imports}
    for module, names in imports.items():
        for name in names:
            while name and name not in imports:
                name = name.rpartition(".")[0]
            if name and name != module:
                arrows[module].add(name)
    return [*homeless(imports), *between_packages(arrows), *upward(arrows), *circles(arrows)]


def homeless(imports: dict[str, set[str]]) -> Iterator[str]:
    for module, names in imports.items():
        for library, homes in HOMES.items():
            at_home = any(is_in(module, home) for home in [library, *homes])
            if not at_home and any(is_in(name, library) for name in names):
                yield f"{module} imports {library}, whose place is {' or '.join(homes)}"


def between_packages(arrows: dict[str, set[str]]) -> Iterator[str]:
    for module, targets in arrows.items():
        for target in targets:
            package, other = module.split(".")[0], target.split(".")[0]
            if other not in (package, "ds_inpaint_protos"):
                yield f"{module} imports {target}, but {package} and {other} share only the wire format"


def upward(arrows: dict[str, set[str]]) -> Iterator[str]:
    for module in arrows:
        if not is_in(module, "ds_inpaint"):
            continue
        floor = floor_of(module)
        if floor is None:
            yield f"{module} stands on no floor: add it to FLOORS"
            continue
        for target in arrows[module]:
            target_floor = floor_of(target) if is_in(target, "ds_inpaint") else None
            if target_floor is not None and target_floor > floor:
                yield f"{module} imports {target}, which stands above it"


def circles(arrows: dict[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> Iterator[str]:
        if module in path:
            yield "circle: " + " -> ".join([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(arrows[module]):
                yield from follow(target, [*path, module])
            done.add(module)

    for module in sorted(arrows):
        yield from follow(module, [])


def test_the_layout_holds():
    assert violations(ROOT) == []


def test_every_floor_is_inhabited():
    standing = {path.stem for path in (ROOT / "ds_inpaint").iterdir()}
    assert set(" ".join(FLOORS).split()) <= standing


HEALTHY = {
    "ds_inpaint/__init__.py": "",
    "ds_inpaint/errors.py": "import torch\nfrom pathlib import Path",
    "ds_inpaint/models/__init__.py": "",
    "ds_inpaint/models/sd.py": "import diffusers\nfrom ds_inpaint.errors import InputError",
    "ds_inpaint/models/flux.py": "from . import _blocks",
    "ds_inpaint/models/_blocks.py": "from ..errors import InputError",
    "ds_inpaint/distributed.py": "import torch.distributed as dist",
    "ds_inpaint/reward_channel.py": "import grpc\nfrom ds_inpaint_protos.reward import reward_pb2",
    "ds_inpaint/reward_client.py": "from ds_inpaint import reward_channel",
    "ds_inpaint/run.py": "from ds_inpaint import errors, reward_client",
    "reward_servers/__init__.py": "",
    "reward_servers/server.py": "import grpc",
    "protos/__init__.py": "",
    "protos/reward/reward_pb2_grpc.py": "import grpc, deepspeed",
}

PLANTED = {
    "an upward arrow": ("ds_inpaint/errors.py", "from ds_inpaint import run", "run, which stands above"),
    "a relative one": ("ds_inpaint/models/sd.py", "from ..run import main", "run, which stands above"),
    "a lazy one": ("ds_inpaint/errors.py", "def f():\n    import ds_inpaint.run", "run, which stands above"),
    "one to the right": (
        "ds_inpaint/models/sd.py",
        "import ds_inpaint.reward_client",
        "reward_client, which stands above",
    ),
    "a package that imports": (
        "ds_inpaint/__init__.py",
        "from .errors import InputError",
        "errors, which stands",
    ),
    "a circle in a folder": (
        "ds_inpaint/models/_blocks.py",
        "from . import flux",
        "circle: ds_inpaint.models",
    ),
    "a circle of servers": (
        "reward_servers/wire.py",
        "from . import again",
        "circle: reward_servers.again -> reward_servers.wire -> reward_servers.again",
    ),
    "deepspeed at large": (
        "ds_inpaint/run.py",
        "import deepspeed.comm",
        "run imports deepspeed, whose place",
    ),
    "diffusers at large": ("ds_inpaint/run.py", "from diffusers.models import X", "run imports diffusers"),
    "a lazy library": ("ds_inpaint/run.py", "def f():\n    from PIL import Image", "run imports PIL"),
    "torch.distributed imported": (
        "ds_inpaint/run.py",
        "from torch import distributed",
        "imports torch.distrib",
    ),
    "torch.distributed used": (
        "ds_inpaint/run.py",
        "torch.distributed.barrier()",
        "imports torch.distributed",
    ),
    "the wire at large": (
        "ds_inpaint/run.py",
        "import ds_inpaint_protos.reward",
        "imports ds_inpaint_protos",
    ),
    "yaml in a server": ("reward_servers/server.py", "import yaml", "reward_servers.server imports yaml"),
    "a trainer that serves": (
        "ds_inpaint/run.py",
        "import reward_servers.server",
        "share only the wire format",
    ),
    "a server that trains": (
        "reward_servers/server.py",
        "import ds_inpaint.errors",
        "share only the wire format",
    ),
    "a wire that trains": ("protos/__init__.py", "import ds_inpaint.errors", "share only the wire format"),
    "a newcomer": ("ds_inpaint/stray.py", "", "ds_inpaint.stray stands on no floor"),
}


@pytest.fixture
def tree(tmp_path):
    files = HEALTHY | {
        "reward_servers/again.py": "from reward_servers import wire",
        "reward_servers/wire.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_healthy_tree_has_no_violations(tree):
    assert violations(tree) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_found(tree, planted):
    name, text, sentence = PLANTED[planted]
    (tree / name).write_text(text)
    found = violations(tree)
    assert any(sentence in violation for violation in found), found
