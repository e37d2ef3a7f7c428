import pytest
import torch
from kernel_problems import ON_THE_CPU, served

from peftkernels.ops.allocation_kernels import AllocationKernels


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices here are tiny: threads only wait for each other, for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[name for name in ON_THE_CPU if name != "eager"])
def kernels(request: pytest.FixtureRequest) -> AllocationKernels:
    """Every implementation but the one that the others must equal."""
    return served(request.param)
