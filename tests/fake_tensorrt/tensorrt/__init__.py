"""As much of TensorRT's Python API as a build touches, in three surfaces: 10.3, 10.12 and 11.

The environment says which: FAKE_TENSORRT is the version, FAKE_TENSORRT_LOG a file that what was
asked of the builder is written to. TensorRT 11 has no precision flags but TF32 and no calibrator.
It parses with onnx, and its engine is a few bytes.
"""

import enum
import json
import os

__version__ = os.environ["FAKE_TENSORRT"]
NUMBERS = tuple(map(int, __version__.split(".")[:2]))
ELEVEN = NUMBERS >= (11, 0)
requests = {"flags": ["TF32"], "profiles": []}  # TF32 is on by default


class _Member(enum.IntEnum):
    pass


def _enum(name, *members):
    return _Member(name, {member: i for i, member in enumerate(members)})


_PRECISIONS = () if ELEVEN else ("FP16", "INT8", "BF16", "FP8", "OBEY_PRECISION_CONSTRAINTS")
BuilderFlag = _enum("BuilderFlag", "TF32", "REFIT", "VERSION_COMPATIBLE", *_PRECISIONS)
NetworkDefinitionCreationFlag = _enum(
    "NetworkDefinitionCreationFlag", *(() if ELEVEN else ("EXPLICIT_BATCH",)), "STRONGLY_TYPED"
)
MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE", "TACTIC_DRAM")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED", "NONE")
TacticSource = _enum("TacticSource", "JIT_CONVOLUTIONS")
PreviewFeature = _enum(
    "PreviewFeature",
    "RUNTIME_ACTIVATION_RESIZE_10_10" if NUMBERS >= (10, 10) else "PROFILE_SHARING_0806",
)
DeviceType = _enum("DeviceType", "GPU", "DLA")
EngineCapability = _enum("EngineCapability", "STANDARD")
LayerType = _enum("LayerType", "ELEMENTWISE", "SOFTMAX", "ACTIVATION")
ActivationType = _enum("ActivationType", "RELU")
OnnxParserFlag = _enum("OnnxParserFlag", "NATIVE_INSTANCENORM")
DataType = _enum("DataType", "FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL")
HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS")
float32 = DataType.FLOAT


class ILogger:
    def __init__(self):
        pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProgressMonitor:
    def __init__(self):
        pass


if not ELEVEN:

    class IInt8Calibrator:
        pass


def init_libnvinfer_plugins(logger, namespace):
    return True


class Tensor:
    is_shape_tensor = False
    dtype = float32

    def __init__(self, name, shape=()):
        self.name, self.shape = name, shape


class Layer:
    def __init__(self, kind, name, inputs, outputs):
        self.type, self.name, self.inputs, self.outputs = kind, name, inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    def get_input(self, i):
        return self.inputs[i]

    def get_output(self, i):
        return self.outputs[i]

    def set_input(self, i, tensor):
        self.inputs[i] = tensor

    if not ELEVEN:
        precision_is_set = False


class Network:
    def __init__(self, flags):
        self.flags, self.layers, self.inputs, self.outputs = flags, [], [], []

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def __iter__(self):
        return iter(self.layers)

    def get_layer(self, i):
        return self.layers[i]

    def get_input(self, i):
        return self.inputs[i]

    def get_output(self, i):
        return self.outputs[i]

    def get_flag(self, flag):
        return bool(self.flags >> int(flag) & 1)

    def add_activation(self, tensor, kind):
        output = Tensor(f"{tensor.name}_{kind.name}")
        self.layers.append(Layer(LayerType.ACTIVATION, output.name, [tensor], [output]))
        return self.layers[-1]


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.errors = network, []

    num_errors = property(lambda self: len(self.errors))

    def get_error(self, i):
        return self.errors[i]

    def parse_from_file(self, path):
        import onnx

        try:
            graph = onnx.load(path).graph
        except Exception as e:
            self.errors.append(str(e))
            return False
        tensors = {}
        for value in graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
            tensors[value.name] = Tensor(value.name, shape)
            self.network.inputs.append(tensors[value.name])
        for node in graph.node:
            kind = LayerType.SOFTMAX if node.op_type == "Softmax" else LayerType.ELEMENTWISE
            names = (*node.input, *node.output)
            inputs, outputs = [], []
            for i, name in enumerate(names):
                side = inputs if i < len(node.input) else outputs
                side.append(tensors.setdefault(name, Tensor(name)) if name else None)
            self.network.layers.append(Layer(kind, node.name, inputs, outputs))
        self.network.outputs = [tensors[value.name] for value in graph.output]
        return True


class OptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def __bool__(self):
        return True

    def set_shape(self, name, smallest, optimal, largest):
        self.shapes[name] = [list(smallest), list(optimal), list(largest)]


class TimingCache:
    def serialize(self):
        return memoryview(b"times of kernels")

    def combine(self, other, ignore_mismatch):
        return True


class BuilderConfig:
    DLA_core = -1
    default_device_type = DeviceType.GPU
    engine_capability = EngineCapability.STANDARD
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor = None
    if not ELEVEN:
        int8_calibrator = None

    def __init__(self):
        self.pools, self.profiles = {}, []

    num_optimization_profiles = property(lambda self: len(self.profiles))

    def __setattr__(self, name, value):
        if name == "builder_optimization_level":
            requests["optimization_level"] = value
        object.__setattr__(self, name, value)

    def set_flag(self, flag):
        requests["flags"] = sorted({*requests["flags"], flag.name})

    def clear_flag(self, flag):
        requests["flags"] = [name for name in requests["flags"] if name != flag.name]

    def get_flag(self, flag):
        return flag.name in requests["flags"]

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        requests["profiles"].append(profile.shapes)

    def set_memory_pool_limit(self, pool, limit):
        self.pools[pool] = limit
        requests["workspace"] = limit

    def get_memory_pool_limit(self, pool):
        return self.pools.get(pool, 0)

    def get_tactic_sources(self):
        return 1

    def get_preview_feature(self, feature):
        return False

    def create_timing_cache(self, data):
        requests.setdefault("timing_caches", []).append(len(data))
        return TimingCache()

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache

    def get_timing_cache(self):
        return self.cache


class Builder:
    num_DLA_cores = 0

    def __init__(self, logger):
        pass

    def create_network(self, flags):
        requests["network_flags"] = [
            flag.name for flag in NetworkDefinitionCreationFlag if flags >> int(flag) & 1
        ]
        return Network(flags)

    def create_builder_config(self):
        return BuilderConfig()

    def create_optimization_profile(self):
        return OptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 4)
        for step in range(4):
            monitor.step_complete("Building engine", step)
        monitor.phase_finish("Building engine")
        softmax = [layer for layer in network if layer.type == LayerType.SOFTMAX]
        requests["softmax"] = len(softmax)
        read = [t.name for layer in network for t in layer.inputs if t is not None]
        requests["read_past_a_relu"] = sum(
            read.count(layer.get_output(0).name) != 1
            or f"{layer.get_output(0).name}_RELU" not in read
            for layer in softmax
        )
        with open(os.environ["FAKE_TENSORRT_LOG"], "a") as log:
            log.write(json.dumps(requests) + "\n")
        return memoryview(b"an engine of " + __version__.encode())
