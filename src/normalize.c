#include "postgres.h"

#include "normalize.h"
