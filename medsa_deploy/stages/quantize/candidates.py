"""Candidate graphs of a bundle → how their masks compare with the float32 graphs'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from medsa_deploy.bundle.manifest import GraphContract, Manifest, Parity
from medsa_deploy.errors import DeviceError
from medsa_deploy.evaluation.cases import Case
from medsa_deploy.evaluation.parity import compare_cases, parity_failures, run_case, summarise
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.interface import Array
from medsa_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeBackend

Watcher = Callable[[str, Array], None]
"""Called with the name of a further output and its value."""


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """A candidate's comparison with the float32 graphs."""

    parity: Parity
    failures: tuple[str, ...]
    """Figures beyond the limits of its precision, over all cases or on the saved reference's."""


class CandidateRunner:
    """Compares candidates with a bundle's float32 graphs on the verification cases."""

    def __init__(
        self, bundle: Path, manifest: Manifest, cases: Sequence[Case], threads: int | None
    ) -> None:
        self.bundle, self.manifest, self.cases, self.threads = bundle, manifest, cases, threads
        self.runs = 0
        """Number of candidates that were run."""
        self.encoder = bundle / manifest.file("encoder").path
        self.decoder = bundle / manifest.file("decoder").path
        with self.open(self.encoder, self.decoder) as session:
            self._expected = [run_case(session, case).tensors for case in cases]

    def open(self, encoder: Path, decoder: Path) -> Session:
        """A session on two files of this network."""
        graphs = self.manifest.graphs
        backend = OnnxRuntimeBackend(encoder, decoder, graphs, threads=self.threads)
        return Session(self.manifest, backend)

    def measure(self, encoder: Path, decoder: Path, precision: str) -> CandidateResult:
        """Run every case on two files and compare with float32."""
        self.runs += 1
        with self.open(encoder, decoder) as session:
            compared = compare_cases(session, self.cases, self._expected)

        def summary(count: int) -> Parity:
            return summarise(
                self.cases[:count],
                compared.comparisons[:count],
                precision=precision,
                backend=OnnxRuntimeBackend.name,
                nan_count=compared.nan_count,
            )

        parity = summary(len(self.cases))
        failures = dict.fromkeys(parity_failures(parity))
        if self.cases[0].seeded:  # `verify` compares the saved reference alone
            failures |= dict.fromkeys(parity_failures(summary(1)))
        return CandidateResult(parity=parity, failures=tuple(failures))


class RecordingBackend(OnnxRuntimeBackend):
    """Graphs with more outputs than the contract's; `on_value` gets the further outputs."""

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        manifest: Manifest,
        on_value: Mapping[str, Watcher],
        threads: int | None,
    ) -> None:
        self._contract_names = {
            id_: [tensor.name for tensor in manifest.graphs[id_].outputs] for id_ in manifest.graphs
        }
        self._watchers = on_value
        super().__init__(encoder, decoder, manifest.graphs, threads=threads)

    def _open(self, role: str, path: Path, contract: GraphContract) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # in the graph's order: in the default order, every watched value is stored until the end
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _run(self, graph: ort.InferenceSession, inputs: dict[str, Array]) -> dict[str, Array]:
        role = "encoder" if graph is self._graphs["encoder"] else "decoder"
        outputs = super()._run(graph, inputs)
        contract = {name: np.asarray(outputs.pop(name)) for name in self._contract_names[role]}
        if not all(np.isfinite(value).all() for value in contract.values()):
            raise DeviceError(f"the float32 {role} gives NaN or Inf: export the checkpoint again")
        for name, value in outputs.items():
            self._watchers[role](name, value)
        return contract
