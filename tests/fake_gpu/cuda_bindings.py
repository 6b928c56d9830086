"""cuda.bindings.driver on a machine in host memory."""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

from .machine import DEVICE, Machine


def bindings_driver(machine: Machine) -> ModuleType:
    """cuda.bindings.driver: calls give a status first."""
    driver = ModuleType("cuda.bindings.driver")
    driver.CUresult = enum.Enum(
        "CUresult",
        {
            "CUDA_SUCCESS": 0,
            "CUDA_ERROR_INVALID_VALUE": 1,
            "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
        },
    )
    driver.CUstreamCaptureMode = enum.Enum(
        "CUstreamCaptureMode", {"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1}
    )
    driver.CUpointer_attribute = enum.Enum(
        "CUpointer_attribute", {"CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": 9}
    )
    done = driver.CUresult.CUDA_SUCCESS

    def cuPointerGetAttribute(attribute: enum.Enum, ptr: int) -> tuple[Any, ...]:
        assert attribute is driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        if ptr in machine.elsewhere:
            return done, 1
        blocks = list(machine.blocks.items())
        if any(start <= ptr <= start + block.nbytes for start, block in blocks):
            return done, 0
        return driver.CUresult.CUDA_ERROR_INVALID_VALUE, None

    def cuDeviceGetName(length: int, dev: int) -> tuple[Any, ...]:
        names = [DEVICE.name, *machine.elsewhere.values()]
        return done, names[dev].encode().ljust(length, b"\0")

    class CUstream:
        def __init__(self, init_value: int = 0) -> None:
            self._handle = init_value

        def __int__(self) -> int:
            return self._handle

    driver.CUstream = CUstream

    def cuStreamBeginCapture(stream: CUstream, mode: enum.Enum) -> tuple[Any, ...]:
        machine.check()
        assert mode is driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        machine.streams[int(stream)].capturing = []
        machine.on_capture()
        return (done,)

    def cuStreamSynchronize(stream: CUstream) -> tuple[Any, ...]:
        machine.awaited.append(int(stream))
        return (done,)

    def cuStreamEndCapture(stream: CUstream) -> tuple[Any, ...]:
        captured = machine.streams[int(stream)]
        graph, captured.capturing = captured.capturing, None
        if machine.uncapturable:
            return driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        machine.captured += 1
        return done, graph

    def cuGraphInstantiate(graph: list[Any], flags: int) -> tuple[Any, ...]:
        machine.graphs += 1
        return done, list(graph)

    def cuGraphDestroy(graph: list[Any]) -> tuple[Any, ...]:
        graph.clear()
        return (done,)

    def cuGraphLaunch(executable: list[Any], stream: CUstream) -> tuple[Any, ...]:
        if machine.unlaunchable:
            return (driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,)
        machine.replayed += 1
        for work in executable:
            machine.streams[int(stream)].add(work)
        return (done,)

    def cuGraphExecDestroy(executable: list[Any]) -> tuple[Any, ...]:
        machine.graphs -= 1
        return (done,)

    for function in (
        *(cuStreamBeginCapture, cuStreamEndCapture, cuStreamSynchronize, cuGraphInstantiate),
        *(cuGraphDestroy, cuGraphLaunch, cuGraphExecDestroy),
        *(cuPointerGetAttribute, cuDeviceGetName),
    ):
        setattr(driver, function.__name__, function)
    return driver
