import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices here are tiny: threads only wait for each other, for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
