#include "postgres.h"

#include "polar.h"
