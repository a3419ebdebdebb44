def truncation(study): raise NotImplementedError
