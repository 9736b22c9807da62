"""`sophia plan`: what fits, how fast and how dear, before anything is bought or started."""

from sophia.memory import MemoryEstimate as MemoryEstimate
from sophia.memory import optimizer_bytes as optimizer_bytes
from sophia.memory import step_memory as step_memory
