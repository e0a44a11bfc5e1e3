"""The vLLM plugin: our flags on vLLM's command line, and the checks before a model loads.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Nothing here imports vLLM
or anything else that is heavy; where the stock scheduler serves, nothing of ours is in the engine.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, NoReturn

from vllm_sarathi.core.config import (
    CONFIG_KEY,
    SCHEDULER_CLS,
    SCHEDULERS,
    STOCK_SCHEDULER,
    ConfigCarrier,
    ConfigError,
    SarathiConfig,
    check_scheduler,
    check_setting,
    config_from_additional,
    flag_name,
    read_config_file,
)
from vllm_sarathi.engine.composition import scheduler_base
from vllm_sarathi.engine.http import serve_classes
from vllm_sarathi.engine.metrics import serve_figures
from vllm_sarathi.engine.trace_file import check_step_trace
from vllm_sarathi.engine.vllm.contract import scheduler_classes
from vllm_sarathi.engine.vllm.internals import loaded_engine_args, logger
from vllm_sarathi.engine.vllm.protocols import VllmConfig
from vllm_sarathi.engine.vllm.support import check_engine, stock_scheduler_path, uses_stock_only

GROUP_TITLE = "Sarathi"
DEST_PREFIX = "sarathi_flag_"
FROM_COMMAND_LINE = "_sarathi_from_command_line"
REGISTERED = "_sarathi_registered"


def register() -> None:
    """Join vLLM's command line and its configuration; calling it again does nothing."""
    engine_args = loaded_engine_args()
    if engine_args is None or REGISTERED in vars(engine_args):
        return
    setattr(engine_args, REGISTERED, True)
    engine_args.add_cli_args = staticmethod(_adding_flags(engine_args.add_cli_args))
    engine_args.from_cli_args = classmethod(_reading_flags(engine_args.from_cli_args.__func__))
    engine_args.create_engine_config = _checking(engine_args.create_engine_config)


def _adding_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
        parser = add_cli_args(parser)
        _join_late(parser)
        return parser

    return wrapper


def _join_late(parser: Any) -> None:
    """Add our flags when the parser is first used: only then is every other owner of a flag name known."""
    for name in ("parse_known_args", "format_help", "format_usage"):
        setattr(parser, name, _joining(parser, getattr(parser, name)))


def _joining(parser: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        add_flags(parser)
        return method(*args, **kwargs)

    return wrapper


def add_flags(parser: Any) -> None:
    """Add our help group and flags to a parser, once."""
    if any(group.title == GROUP_TITLE for group in parser._action_groups):
        return
    group = parser.add_argument_group(
        title=GROUP_TITLE,
        description="Scheduling by latency SLOs, from vllm-sarathi. Any of these flags turns it on.",
    )
    for setting in fields(SarathiConfig):
        options: dict[str, Any] = {"help": setting.metadata["help"]}
        if setting.name == "scheduler":
            options["metavar"] = f"{{{','.join((*SCHEDULERS, STOCK_SCHEDULER))}}}"
        if setting.type is bool:
            options |= {"action": "store_true"}
        else:
            options = {"type": _parser_of(setting), "metavar": setting.metadata["metavar"], **options}
        _add_flag(parser, group, flag_name(setting.name), **options)
    _add_flag(
        parser,
        group,
        "--sarathi-config",
        metavar="FILE.json",
        help="A JSON file that holds any of these settings (token_budget for --token-budget); flags override it.",
    )


def _add_flag(parser: Any, group: Any, flag: str, **options: Any) -> None:
    """Add one flag; where its name is taken by vLLM or another plugin, under a longer one, and say so."""
    dest = DEST_PREFIX + flag.removeprefix("--").replace("-", "_")
    name = flag
    if flag in parser._option_string_actions:
        name = "--sarathi-" + flag.removeprefix("--")
        logger.warning("%s belongs to vLLM or another plugin; vllm-sarathi's is %s.", flag, name)
    group.add_argument(name, dest=dest, default=argparse.SUPPRESS, **options)


def _parser_of(setting: "Field[Any]") -> Callable[[str], Any]:
    """Return the function that reads a flag's text, with errors that argparse shows in one line."""

    def parse(text: str) -> Any:
        try:
            if setting.name == "scheduler":
                return check_scheduler(text)
            value = text if setting.type == str | None else _number(text)
            check_setting(setting.name, value)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return parse


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def flag_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line names: those of `--sarathi-config`, under those of the flags.

    Raises:
        ConfigError: the file cannot be used.
    """
    given = {k.removeprefix(DEST_PREFIX): v for k, v in vars(args).items() if k.startswith(DEST_PREFIX)}
    path = given.pop("sarathi_config", None)
    return {**(read_config_file(path) if path is not None else {}), **given}


def _reading_flags(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(from_cli_args)
    def wrapper(cls: Any, args: argparse.Namespace) -> Any:
        try:
            settings = flag_settings(args)
            engine_args = from_cli_args(cls, args)
            apply_settings(engine_args, settings)
            if (config := _carried(engine_args)) is not None:
                serve_classes(config, getattr(args, "middleware", []))
        except ConfigError as error:
            _exit(error)
        setattr(engine_args, FROM_COMMAND_LINE, True)
        return engine_args

    return wrapper


def apply_settings(engine_args: Any, settings: dict[str, Any]) -> None:
    """Put the settings where the engine core finds them; other plugins' `additional_config` stays as it is.

    Raises:
        ConfigError: a setting is wrong, or two schedulers are named.
    """
    if not settings:
        return
    scheduler = check_scheduler(settings.get("scheduler", SarathiConfig().scheduler))
    if scheduler == STOCK_SCHEDULER:
        others = sorted(key for key in settings if key != "scheduler")
        if others:
            raise ConfigError(
                f"{flag_name(others[0])} {settings[others[0]]!r}: has no effect with --scheduler "
                f"{STOCK_SCHEDULER}; valid with --scheduler {', '.join(SCHEDULERS)}."
            )
        return
    if engine_args.scheduler_cls not in (None, SCHEDULER_CLS):  # it goes on below ours
        named = engine_args.scheduler_cls
        base = f"{named.__module__}.{named.__qualname__}" if isinstance(named, type) else named
        if settings.get("scheduler_base") not in (None, base):
            raise ConfigError(
                f"--scheduler-base {settings['scheduler_base']}: --scheduler-cls {base!r} names another scheduler; "
                "give one of the two."
            )
        settings = {**settings, "scheduler_base": base}
    config = SarathiConfig.from_mapping(settings)
    engine_args.scheduler_cls = SCHEDULER_CLS
    engine_args.additional_config = {
        **(engine_args.additional_config or {}),
        CONFIG_KEY: ConfigCarrier(config),
    }


def _carried(engine_args: Any) -> SarathiConfig | None:
    """Return our settings that an engine's arguments carry; None where they carry none."""
    carrier = (engine_args.additional_config or {}).get(CONFIG_KEY)
    return carrier.config if isinstance(carrier, ConfigCarrier) else None


def _checking(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create_engine_config(self, *args, **kwargs)
        try:
            check_before_load(vllm_config)
        except ConfigError as error:
            if getattr(self, FROM_COMMAND_LINE, False):
                _exit(error)
            raise
        return vllm_config

    return wrapper


def names_our_scheduler(scheduler_cls: object) -> bool:
    """True for our dotted path or our class, however it was named."""
    if isinstance(scheduler_cls, type):
        scheduler_cls = f"{scheduler_cls.__module__}.{scheduler_cls.__name__}"
    return isinstance(scheduler_cls, str) and scheduler_cls.startswith(CONFIG_KEY + ".")


def check_before_load(vllm_config: VllmConfig) -> None:
    """Check our settings against the engine's before it loads a model, if ours is the scheduler.

    A model that cannot be scheduled in chunks is handed to vLLM's own scheduler, with a warning.

    Raises:
        ConfigError: a setting that this engine cannot keep.
    """
    scheduler_config = vllm_config.scheduler_config
    named = scheduler_config.scheduler_cls
    configured = (
        isinstance(vllm_config.additional_config, Mapping) and CONFIG_KEY in vllm_config.additional_config
    )
    if not names_our_scheduler(named) and not (named is not None and configured):
        return  # a class of the user's that holds the mixin is known by its settings
    config = config_from_additional(vllm_config.additional_config)
    reason = uses_stock_only(vllm_config)
    if reason is not None:
        logger.warning("%s is %s: vLLM's own scheduler serves it.", vllm_config.model_config.model, reason)
        scheduler_config.scheduler_cls = stock_scheduler_path(vllm_config)
        return
    check_engine(vllm_config, config)
    if config.scheduler_base is not None:
        scheduler_base(config.scheduler_base, scheduler_classes()[0])
    check_step_trace(config.step_trace)
    serve_figures()


def _exit(error: ConfigError) -> NoReturn:
    """End a command line that cannot work, as argparse does: one sentence, exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
