"""`Profile`: what is known of one board, as its TOML file says it. A number nobody gave is `None`.

Field names are the keys of the file, so these classes are the schema: `profile_decode` reads tables
by them and `profile_schema` publishes them. `src` names, for each number of its table, the entry of
`[sources]` that it comes from; a plain string stands for all of them (key `*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

SCHEMA_VERSION: Final = 1
ALL_KEYS: Final = "*"
"""The key of `src` that stands for every number of its table."""

Src = Mapping[str, str]


def _nothing() -> dict[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Detect:
    """How a board is recognised: every group that is given must match, the highest score wins."""

    score: int
    dt_compatible_any: tuple[str, ...] = ()
    """Whole tokens of the device tree's root `compatible`; one of them must be there."""
    dt_soc: str | None = None
    """One more such token, of the system on chip."""
    arch: str | None = None
    cpu_vendor: str | None = None
    cpu_family: int | None = None
    cpu_model_any: tuple[int, ...] = ()
    cpu_word_any: tuple[str, ...] = ()
    """Whole words of the processor's name."""
    flags_all: tuple[str, ...] = ()
    chassis_any: tuple[int, ...] = ()
    """DMI chassis types; 9, 10, 31 and 32 are portable."""
    mem_mib: tuple[int, ...] = ()
    """Least and most of `MemTotal`."""
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The accelerator."""

    kind: Literal["cuda"]
    sm: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What the board has."""

    arch: Literal["x86_64", "aarch64"]
    cores: int | None = None
    isa: tuple[str, ...] = ()
    """Instruction sets, as Linux names them."""
    mem_mib: int | None = None
    mem_shared_gpu: bool = False
    gpu: Gpu | None = None
    mem_bandwidth_gbs: Mapping[str, float] = field(default_factory=dict)
    """10^9 bytes per second by power mode; the peak of the memory, not what a program reaches."""
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How models run there; a choice that is not given is the program's own."""

    executor: Literal["auto", "onnx", "openvino"] = "auto"
    providers: tuple[Literal["cpu", "cuda", "tensorrt"], ...] = ("cpu",)
    """Execution providers of ONNX Runtime, in order of preference."""
    recipe: str | None = None
    """The compression that `tidegate convert` starts from."""
    graphs: tuple[Literal["int8kv", "fp16"], ...] = ()
    """Further ONNX graphs that it adds; all providers but the CPU's run the float16 one."""
    kv_precision: Literal["u8", "u4", "f16", "f32"] | None = None
    """Bits of keys and values."""
    threads: int | None = None
    rows: int | None = None
    """Requests that run at once."""
    kv_mib: int | None = None
    """Most that keys and values may take."""
    max_model_mib: int | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One power mode, by name: ids differ between modules and are looked up on the device."""

    name: str
    default: bool = False
    knee: bool = False
    """Least joules per token; needs a source."""
    cores: int | None = None
    cpu_max_khz: int | None = None
    gpu_max_mhz: int | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """How power modes are switched."""

    tool: Literal["nvpmodel", "cpufreq", "none"] = "none"
    min_dwell_s: float | None = None
    mode: tuple[Mode, ...] = ()
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSensor:
    """One way to read watts or joules. `scope` says what the rail `total` covers."""

    backend: Literal["rapl", "ina3221", "rpi_pmic", "power_supply", "hwmon", "model"]
    glob: str | None = None
    scope: str | None = None
    rails: Mapping[str, str] = field(default_factory=dict)
    """What the rail measures, and its label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThermalSensor:
    """A thermal zone, by type."""

    zone_type: str
    soft_c: float | None = None
    hard_c: float | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensors:
    """What can be read on the board."""

    power: tuple[PowerSensor, ...] = ()
    thermal: tuple[ThermalSensor, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pole:
    """One first-order pole from watts to kelvin; without `tau_s` only its end is known."""

    r_kw: float
    """Kelvin per watt."""
    tau_s: float | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thermal:
    """How the board warms up."""

    pole: tuple[Pole, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Watts:
    """Power of the idle board, or of one under a named load."""

    w: float
    scope: str
    mode: str | None = None
    cond: str | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measured run of a model."""

    model: str
    quant: str
    runtime: str
    scope: str | None = None
    """What `active_w` covers; needed beside it."""
    mode: str | None = None
    batch: int = 1
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    active_w: float | None = None
    active: Literal["mean", "peak"] = "mean"
    """Whether `active_w` is the mean of the run or its peak, which bounds joules from above."""
    cond: str | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScopeMap:
    """Watts of scope `to` from watts of another: `a + b * w`."""

    from_: str
    to: str
    a: float
    b: float
    n_points: int | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """What was measured of the board's energy."""

    idle: tuple[Watts, ...] = ()
    load: tuple[Watts, ...] = ()
    point: tuple[Point, ...] = ()
    scope_map: tuple[ScopeMap, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Radio:
    """Device energy of one network: joules per 10^6 bytes, and the tail after a transfer."""

    scope: str
    up_j_mb: float | None = None
    down_j_mb: float | None = None
    tail_s: float | None = None
    tail_w: float | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Battery:
    """Whether the board brings a battery."""

    present: bool = False
    capacity_wh: float | None = None
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """Limits of the daemon as a system service."""

    watchdog_s: float | None = None
    memory_max: str | None = None
    """A share of memory such as `75%`."""
    groups: tuple[str, ...] = ()
    """Groups that its sensors need."""
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The vendor's software that the board needs."""

    channel: str | None = None
    min_l4t: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where numbers come from, and how far to trust them.

    `measured` by a third party, `documented` by the vendor or in its files, `derived` from such
    numbers, `recalled` and not read again, `chosen` by us as a setting.
    """

    kind: Literal["measured", "documented", "derived", "recalled", "chosen", "calibrated"]
    note: str
    url: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """That the numbers were measured on the device itself."""

    date: str
    r2: float
    """Share of the variance that the fitted model explains."""
    residual: float
    """Median relative error."""
    device: str | None = None
    """Its processor, so that nobody overwrites another device's numbers by mistake."""
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedMode:
    """What work costs in one power mode: see `tidegate.edge.energy.cost.ModeCost`.

    Watts that nobody measured on the device are left out.
    """

    name: str
    prefill_token_s: float
    step_s: float
    prefill_start_s: float = 0.0
    part_tokens: int | None = None
    prefill_context_s: float = 0.0
    row_s: float = 0.0
    beside_s: float = 0.0
    context_token_s: float = 0.0
    prefill_w: float | None = None
    decode_w: float | None = None
    idle_w: float | None = None
    prefill_r2: float | None = None
    decode_r2: float | None = None
    """Shares of the variance of the fitted points that the fit explains."""
    prefill_error: float | None = None
    decode_error: float | None = None
    """Median relative errors at points that were not fitted."""
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedCosts:
    """What one model costs on the device at the settings it was measured with."""

    model: str
    weights: str
    """Digest of the files that were run, see `tidegate.edge.energy.fitted_costs`."""
    executor: Literal["onnx", "openvino"]
    rows: int
    date: str
    device: str | None = None
    """Its processor and cores; costs that do not say it are nobody's."""
    threads: int | None = None
    """None: the library's own choice."""
    kv_precision: str | None = None
    """None: the executor's own choice."""
    native: str = "auto"
    providers: tuple[str, ...] = ("cpu",)
    scope: str | None = None
    """What the watts cover; needed beside them."""
    load_s: float | None = None
    switch_s: float | None = None
    """That a change of the power mode takes."""
    mode: tuple[FittedMode, ...]
    """From the slowest to the fastest."""
    src: Src = field(default_factory=_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One board. `abstract` ones are only there to be extended."""

    schema: Literal[1]
    id: str
    title: str
    hardware: Hardware
    extends: str | None = None
    abstract: bool = False
    status: Literal["seeded", "calibrated", "verified"] = "seeded"
    detect: Detect | None = None
    runtime: Runtime = field(default_factory=Runtime)
    power: Power = field(default_factory=Power)
    sensor: Sensors = field(default_factory=Sensors)
    thermal: Thermal = field(default_factory=Thermal)
    energy: Energy = field(default_factory=Energy)
    radio: Mapping[str, Radio] = field(default_factory=dict)
    battery: Battery = field(default_factory=Battery)
    service: Service = field(default_factory=Service)
    update: Update = field(default_factory=Update)
    calibration: Calibration | None = None
    cost: tuple[FittedCosts, ...] = ()
    """Of models that were measured on the device, by `tidegate profile calibrate`."""
    sources: Mapping[str, Source] = field(default_factory=dict)
