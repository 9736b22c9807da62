"""What a model remembers of the tokens it has read, so that the next one costs one position instead of all."""

from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer for the tokens read so far.

    Give the same cache to :meth:`sophia.model.GPT.hidden` again and again, each time with the tokens that follow. The
    memory for the whole context is taken at the first use: 2 · layers · batch · context · width numbers.

    Example:
        >>> cache = KeyValueCache()
        >>> prompt = model.head(model.hidden(tokens[:, :5], cache)[:, -1])  # logits of token 5
        >>> following = model.head(model.hidden(tokens[:, 5:6], cache)[:, -1])  # logits of token 6
    """

    def __init__(self) -> None:
        self.length = 0
        """Tokens read."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values, and return all it has: each [batch, heads, time, head width].

        `length` counts them only when the model has run all layers.
        """
        if layer not in self._layers:
            batch, heads, _, width = keys.shape
            room = (batch, heads, context, width)
            self._layers[layer] = (keys.new_empty(room), values.new_empty(room))
        end = self.length + keys.shape[2]
        kept_keys, kept_values = self._layers[layer]
        if len(kept_keys) != len(keys):
            raise ValueError(f"the cache holds a batch of {len(kept_keys)}, not {len(keys)}: begin a new one")
        kept_keys[:, :, self.length : end] = keys
        kept_values[:, :, self.length : end] = values
        return kept_keys[:, :, :end], kept_values[:, :, :end]
