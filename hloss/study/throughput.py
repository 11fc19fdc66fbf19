"""Steps per second of training, measured on GPUs, and the estimates for other runs that follow from them."""

from dataclasses import dataclass
from pathlib import Path

from hloss.runs.config import RunConfig
from hloss.study.input_files import read_csv

MEASURED = Path("workflow/throughput.csv")
SLICES = 4 / 3  # cost of a batch in slices, whose images are embedded twice


@dataclass(frozen=True)
class Throughput:
    """Measured throughput of one GPU.

    Attributes:
        card: name of the GPU.
        images_per_second: (network, precision, tf32) -> batch size -> images per second.
    """

    card: str
    images_per_second: dict[tuple[str, str, str], dict[int, float]]

    def seconds(self, config: RunConfig) -> float | None:
        """Estimate the seconds of an iteration, without validations.

        Args:
            config: settings of a run.

        Returns:
            Seconds by the images per second of the most similar batch size, and of the smallest for smaller batches,
            whose steps may take as long; None if the network was not measured with this precision, or the run has
            several devices.
        """
        tf32 = config.tf32 if config.precision == "32-true" else "convolutions"
        rates = self.images_per_second.get((config.network, config.precision, tf32))
        if rates is None or config.devices > 1:
            return None
        similar = min(rates, key=lambda size: max(size, config.batch_size) / min(size, config.batch_size))
        return max(config.batch_size, min(rates)) / rates[similar] * (SLICES if config.slice_size else 1.0)


def read_throughput(file: Path = MEASURED) -> dict[str, Throughput]:
    """Read measured throughputs.

    Args:
        file: CSV file with the columns of workflow/throughput.csv.

    Returns:
        Name of the GPU -> its throughput, in the order of the file.

    Raises:
        ConfigError: if the file cannot be read, has other columns, or lacks a number.
    """
    found: dict[str, Throughput] = {}
    columns = ("card", "network", "batch_size", "precision", "tf32", "floor_steps_per_second", "steps_per_second")
    table = read_csv(file, (*columns, "date", "versions"), ("batch_size", "steps_per_second"))
    for row in table.itertuples():
        rates = found.setdefault(row.card, Throughput(row.card, {})).images_per_second
        rates.setdefault((row.network, row.precision, row.tf32), {})[row.batch_size] = (
            row.batch_size * row.steps_per_second
        )
    return found
