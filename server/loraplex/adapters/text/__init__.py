"""An adapter's own tokenizer, template and generation settings, as the engine's side reads them."""
