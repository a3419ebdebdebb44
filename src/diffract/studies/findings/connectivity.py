def connectivity(study): raise NotImplementedError
