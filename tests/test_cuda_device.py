"""What the CUDA device asks of the driver, and what it says when the driver refuses."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fake_driver import FakeDriver, Result, installed, opened, real
from wicore.engine.tensorrt import cuda
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.errors import EngineError

MIB = 1 << 20


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return installed(monkeypatch)


@pytest.fixture
def device(driver: FakeDriver) -> Iterator[CudaDevice]:
    yield from opened(driver)


def test_a_device_describes_its_card(device: CudaDevice) -> None:
    assert (device.name, device.sms, device.capability) == ("Fake H200", 132, (9, 0))
    assert device.memory_total == device.memory_free == 10**9


def test_a_missing_binding_is_named_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(EngineError, match=r"cuda-bindings is not installed.*install wicore\[gpu\]"):
        CudaDevice()


def test_a_missing_driver_is_named(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(flags: int) -> None:
        raise RuntimeError("libcuda.so.1: no such file")

    monkeypatch.setattr(driver, "cuInit", init, raising=False)
    with pytest.raises(EngineError, match=r"driver cannot be loaded \(libcuda\.so\.1.*install the driver"):
        CudaDevice()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"fails": {"cuInit": Result.CUDA_ERROR_NO_DEVICE}},
            r"starting CUDA .*CUDA_ERROR_NO_DEVICE \(words of 100\)",
        ),
        ({"count": 0}, r"GPU 0: CUDA shows 0 GPUs.*CUDA_VISIBLE_DEVICES"),
        ({"capability": (7, 5)}, r"Fake H200\): expected compute capability 8\.0 or newer; found 7\.5"),
    ],
)
def test_a_machine_without_a_fit_gpu_is_told_why(
    driver: FakeDriver, change: dict[str, Any], words: str
) -> None:
    for name, value in change.items():
        setattr(driver, name, value)
    with pytest.raises(EngineError, match=words):
        CudaDevice()


def test_a_function_that_the_driver_lacks_says_to_update_it(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*args: Any) -> None:
        raise RuntimeError('Function "cuGraphInstantiate" not found')

    monkeypatch.setattr(driver, "cuGraphInstantiate", absent, raising=False)
    with pytest.raises(EngineError, match=r"driver is too old for these bindings.*update the driver"):
        device.capture(device.stream(), lambda: None)


def test_a_cubin_that_the_driver_cannot_load_says_which_is_too_old(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 5))
    driver.fails["cuModuleLoadData"] = Result.CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    with pytest.raises(
        EngineError, match=r"kernels/x\.cu: the driver \(CUDA 13\.0\) cannot load what NVRTC 13\.5"
    ):
        device.compile("x.cu", {})


def test_every_result_is_checked(device: CudaDevice, driver: FakeDriver) -> None:
    stream, event, memory = device.stream(), device.event(), device.allocate(16, "x")
    graph = device.capture(stream, lambda: None)
    bad = Result.CUDA_ERROR_INVALID_VALUE
    cases: dict[str, Any] = {
        "cuMemcpyAsync": lambda: device.copy(memory.address, memory.address, 8, stream),
        "cuMemsetD8Async": lambda: device.fill(memory.address, 0, 16, stream),
        "cuStreamCreate": device.stream,
        "cuEventCreate": device.event,
        "cuEventRecord": lambda: event.record(stream),
        "cuEventQuery": event.done,
        "cuEventSynchronize": event.wait,
        "cuEventElapsedTime": lambda: event.elapsed_ms(event),
        "cuStreamWaitEvent": lambda: stream.wait(event),
        "cuStreamSynchronize": stream.synchronize,
        "cuCtxSynchronize": device.synchronize,
        "cuGraphLaunch": lambda: graph.launch(stream),
        "cuStreamBeginCapture": lambda: device.capture(stream, lambda: None),
        "cuStreamEndCapture": lambda: device.capture(stream, lambda: None),
        "cuGraphInstantiate": lambda: device.capture(stream, lambda: None),
        "cuMemAlloc": lambda: device.allocate(8, "y"),
        "cuMemHostAlloc": lambda: device.allocate_host(8),
        "cuMemGetInfo": lambda: device.memory_free,
        "cuModuleLoadData": lambda: device.compile("x.cu", {"A": 1}),
        "cuModuleGetFunction": lambda: device.compile("y.cu", {}).function("f"),
        "cuFuncSetAttribute": lambda: device.compile("y.cu", {}).function("f", 100_000),
        "cuTensorMapEncodeTiled": lambda: device.tensor_map_2d(memory.address, 1, 8, 16, 1, 8),
    }
    for function, call in cases.items():
        driver.fails = {function: bad}
        with pytest.raises(EngineError, match=r"CUDA_ERROR_INVALID_VALUE \(words of 1\)"):
            call()
        driver.fails = {}
    assert device.report() == {"x": 16}
    stream.synchronize()  # none of these lost the context


def test_a_fault_is_told_again_by_every_later_call(device: CudaDevice, driver: FakeDriver) -> None:
    stream, memory = device.stream(), device.allocate(16, "x")
    driver.fails["cuStreamSynchronize"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    words = "cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS.*context is lost, restart this process"
    with pytest.raises(EngineError, match=words):
        stream.synchronize()
    driver.fails.clear()
    count = len(driver.calls)
    for call in (
        stream.synchronize,
        device.stream,
        lambda: device.allocate(1, "y"),
        lambda: device.memory_free,
    ):
        with pytest.raises(EngineError, match=words):
            call()
    memory.free()
    device.close()
    assert len(driver.calls) == count


def test_memory_is_kept_within_the_budget(driver: FakeDriver) -> None:
    device = CudaDevice(memory_bytes=600 * 10**6)
    weights = device.allocate(500 * 10**6, "weights")
    device.allocate(10, "tables")
    with pytest.raises(EngineError) as raised:
        device.allocate(200 * 10**6, "KV blocks")
    assert raised.value.message == (
        "engine.device_memory_bytes: KV blocks need 0.2 GB, 100.0 MB of 0.6 GB are left (weights 0.5 GB, "
        "tables 0.0 MB); raise it or lower what else is kept on the GPU"
    )
    assert device.report() == {"weights": 500 * 10**6, "tables": 10}
    assert device.memory_free == 100 * 10**6 - 10
    weights.free()
    weights.free()
    assert device.memory_free == 600 * 10**6 - 10
    device.close()
    assert driver.memory == {}


def test_a_full_card_is_told_with_what_fills_it(device: CudaDevice, driver: FakeDriver) -> None:
    device.allocate(1000, "weights")
    driver.fails["cuMemAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    words = r"KV blocks need 2\.0 GB, 1\.0 GB of Fake H200's 1\.0 GB are free \(weights .*end other programs"
    with pytest.raises(EngineError, match=words):
        device.allocate(2 * 10**9, "KV blocks")
    for size, function in ((10**6, "cuMemHostAlloc"), (10**7, "cuMemHostRegister")):
        driver.fails = {function: Result.CUDA_ERROR_OUT_OF_MEMORY}
        with pytest.raises(EngineError, match=rf"{size // 10**6}\.0 MB of host memory .*ulimit -l"):
            device.allocate_host(size)
    for allocate in (lambda: device.allocate(0, "x"), lambda: device.allocate_host(0)):
        with pytest.raises(EngineError, match="expected a size above 0"):
            allocate()


@pytest.mark.parametrize(("version", "batches"), [(13000, 1), (12080, 0)])
def test_many_copies_are_one_call_where_the_driver_has_it(
    driver: FakeDriver, version: int, batches: int
) -> None:
    driver.version = version
    device = CudaDevice()
    host, memory, stream = device.allocate_host(64), device.allocate(64, "x"), device.stream()
    host.array[:] = np.arange(64)
    targets = np.uint64(memory.address) + np.array([0, 32, 16], np.uint64)
    sources = np.uint64(host.address) + np.array([8, 40, 24], np.uint64)
    device.copy_many(targets, sources, 8, stream)
    found = bytes(driver.memory[memory.address])
    assert [found[at] for at in (0, 7, 32, 39, 16, 23)] == [8, 15, 40, 47, 24, 31]
    assert len(driver.called("cuMemcpyBatchAsync")) == batches
    assert len(driver.called("cuMemcpyAsync")) == 3 * (not batches)


def test_arguments_are_packed_by_their_types(device: CudaDevice, driver: FakeDriver) -> None:
    driver.parameters = [8, 4, 8, 4, 128, 1, 8, 2]
    tensor_map = device.tensor_map_2d(4096, 64, 128, 256, 32, 64)
    args = (1 << 40, np.int32(-5), np.int64(-6), np.float32(1.5), tensor_map, np.int8(-7), np.uint64(1 << 63))
    function = device.compile("x.cu", {}).function("f")
    function(device.stream(), 3, (64, 2), (*args, np.float16(2)), dynamic_shared=100)
    function(device.stream(), 3, (64, 2), (7, *args[1:], np.float16(2)))
    (config, values), (_, again) = driver.launches
    assert values == [
        (1 << 40).to_bytes(8, "little"),
        *(arg.tobytes() for arg in args[1:4]),
        bytes(128),
        *(arg.tobytes() for arg in args[5:]),
        np.float16(2).tobytes(),
    ]
    assert again == [(7).to_bytes(8, "little"), *values[1:]]
    assert [config.gridDimX, config.gridDimY, config.gridDimZ] == [3, 1, 1]
    assert [config.blockDimX, config.blockDimY, config.blockDimZ] == [64, 2, 1]
    assert config.sharedMemBytes == 100


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((1,), "f: takes more than the 1 arguments given"),
        ((1, np.int32(2), 3), "f: takes 2 arguments, given 3"),
        ((1, 2), "f: argument 1 has 4 bytes, given 8"),
        ((1, 2.5), "f: argument 1: expected int, a numpy scalar or a tensor map; found 2.5"),
        ((-1, np.int32(2)), r"f: arguments \(-1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    device: CudaDevice, driver: FakeDriver, args: tuple[Any, ...], words: str
) -> None:
    driver.parameters = [8, 4]
    with pytest.raises(EngineError, match=words):
        device.compile("x.cu", {}).function("f")(device.stream(), 1, 32, args)
    assert driver.launches == []


@pytest.mark.parametrize(
    ("capability", "version", "dependent", "expected"),
    [((9, 0), 13000, True, 1), ((9, 0), 13000, False, 0), ((8, 9), 13000, True, 0), ((9, 0), 12020, True, 0)],
)
def test_a_dependent_launch_is_asked_for_where_card_and_driver_have_it(
    driver: FakeDriver, capability: tuple[int, int], version: int, dependent: bool, expected: int
) -> None:
    driver.capability, driver.version = capability, version
    device = CudaDevice()
    device.compile("x.cu", {}).function("f")(device.stream(), 1, 32, (), dependent=dependent)
    ((config, _),) = driver.launches
    assert config.numAttrs == expected
    if expected:
        (attribute,) = config.attrs
        assert attribute.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert attribute.value.programmaticStreamSerializationAllowed == 1


def test_a_launch_that_fails_names_the_kernel(device: CudaDevice, driver: FakeDriver) -> None:
    function = device.compile("x.cu", {}).function("embed")
    driver.fails["cuLaunchKernelEx"] = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        EngineError, match=r"launching embed, grid \(1, 2\), block 32: CUDA_ERROR_INVALID_VALUE"
    ):
        function(device.stream(), (1, 2), 32, ())
    with pytest.raises(
        EngineError, match=r"embed: needs 300000 bytes of shared memory a block, Fake H200 has"
    ):
        device.compile("x.cu", {}).function("embed", 300_000)


def test_a_source_is_compiled_and_loaded_once(device: CudaDevice, driver: FakeDriver) -> None:
    first = device.compile("x.cu", {"A": 1, "B": "2"})
    assert device.compile("x.cu", {"B": 2, "A": "1"}) is first
    assert device.compile("x.cu", {"A": 2}) is not first
    assert driver.called("cuModuleLoadData") == [(b"cubin of x.cu",)] * 2
    assert first.function("f", 100_000) is first.function("f", 100_000)
    kinds = real.CUfunction_attribute
    assert [args[1:] for args in driver.called("cuFuncSetAttribute")] == [
        (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 100_000),
        (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ]


def test_a_capture_that_fails_is_ended_and_tells_what_failed(device: CudaDevice, driver: FakeDriver) -> None:
    def work() -> None:
        raise EngineError("no more room")

    with pytest.raises(EngineError, match="no more room"):
        device.capture(device.stream(), work)
    assert not driver.capturing
    assert driver.called("cuGraphInstantiate") == []
    assert len(driver.called("cuGraphDestroy")) == 1


def test_a_graph_is_launched_until_it_is_closed(device: CudaDevice, driver: FakeDriver) -> None:
    stream = device.stream()
    graph = device.capture(stream, lambda: None)
    graph.launch(stream)
    graph.close()
    graph.close()
    with pytest.raises(EngineError, match="closed"):
        graph.launch(stream)
    assert len(driver.called("cuGraphLaunch")) == len(driver.called("cuGraphExecDestroy")) == 1
    assert len(driver.called("cuGraphDestroy")) == 1


def test_every_thread_enters_the_context(device: CudaDevice, driver: FakeDriver) -> None:
    device.stream()
    before = len(driver.called("cuCtxSetCurrent"))
    thread = threading.Thread(target=lambda: [device.stream() for _ in range(3)])
    thread.start()
    thread.join()
    assert len(driver.called("cuCtxSetCurrent")) == before + 1


def test_an_event_is_done_when_the_driver_says_so(device: CudaDevice, driver: FakeDriver) -> None:
    event, timed = device.event(), device.event(timing=True)
    driver.fails["cuEventQuery"] = Result.CUDA_ERROR_NOT_READY
    assert not event.done()
    driver.fails.clear()
    assert event.done()
    assert timed.elapsed_ms(timed) == 1.5
    flags = real.CUevent_flags
    assert driver.called("cuEventCreate") == [(flags.CU_EVENT_DISABLE_TIMING,), (flags.CU_EVENT_DEFAULT,)]


def test_streams_and_events_go_with_the_last_reference(device: CudaDevice, driver: FakeDriver) -> None:
    for thing in (device.stream(), device.event()):
        del thing
    assert len(driver.called("cuStreamDestroy")) == len(driver.called("cuEventDestroy")) == 1


def test_a_closed_device_gives_everything_back_and_refuses(driver: FakeDriver) -> None:
    device = CudaDevice()
    memory, stream = device.allocate(8, "x"), device.stream()
    device.allocate_host(8)
    device.compile("x.cu", {})
    device.close()
    device.close()
    memory.free()
    assert driver.memory == {}
    assert len(driver.called("cuModuleUnload")) == len(driver.called("cuDevicePrimaryCtxRelease")) == 1
    with pytest.raises(EngineError, match="GPU 0: the device was closed"):
        stream.synchronize()


def test_a_known_launch_costs_little(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.parameters = [8] * 8 + [4] * 6
    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *args: (Result.CUDA_SUCCESS,))
    function, stream = device.compile("x.cu", {}).function("f"), device.stream()
    args = (*range(8), *(np.int32(i) for i in range(6)))

    def launches() -> float:
        begin = time.perf_counter()
        for _ in range(1000):
            function(stream, (132, 1), 256, args, 1000)
        return (time.perf_counter() - begin) / 1000

    assert (
        min(launches() for _ in range(5)) < 100e-6
    )  # microseconds where it counts; this machine may be busy


def test_a_traced_graph_times_each_launch_by_events_inside_it(device: CudaDevice, driver: FakeDriver) -> None:
    function, stream = device.compile("x.cu", {}).function("f"), device.stream()
    driver.parameters = [8, 4]
    graph, launches = device.traced(stream, lambda: function(stream, 1, 32, (1 << 40, np.int32(7))))
    graph.launch(stream)
    assert [(each.kernel, each.integers, each.ms) for each in launches] == [("f", (7,), 1.5)]
    recorded = [event for event, _, _ in driver.called("cuEventRecordWithFlags")]
    assert recorded == [launches[0].start.native, launches[0].end.native]
    assert len(driver.launches) == 1
    function(stream, 1, 32, (1 << 40, np.int32(7)))
    assert len(launches) == 1


def test_a_capture_may_forbid_its_launches_to_overlap(device: CudaDevice, driver: FakeDriver) -> None:
    function, stream = device.compile("x.cu", {}).function("f"), device.stream()

    def work() -> None:
        function(stream, 1, 32, ())

    device.capture(stream, work, overlapping=False)
    device.capture(stream, work)
    assert [config.numAttrs for config, _ in driver.launches] == [0, 1]
